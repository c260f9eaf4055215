"""`python -m agentsse`: the same as the command `agentsse`."""

from agentsse.cli import main

if __name__ == "__main__":
    main()
