"""The relay of a model's tokens that is ours: a model agent, with the settings of `bench.ours`.

Prints its address as a JSON line. Run as `python -m bench.peers.relay_ours URL`.
"""

import os
import sys

from agentsse import Agent
from agentsse.providers import HttpProvider
from agentsse.providers.openai_chat import OpenAIChatApi
from bench.ours import serve_quietly

if __name__ == "__main__":
    os.environ["no_proxy"] = "*"  # everything is on loopback
    provider = HttpProvider("up", OpenAIChatApi(base_url=sys.argv[1]))
    serve_quietly([Agent.of_model("relay", "up:m", provider=provider)])
