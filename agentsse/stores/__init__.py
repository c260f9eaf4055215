"""Where runs are kept once they are over."""
