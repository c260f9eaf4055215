"""One live run, and the clients of several protocols on it at once, each as its vendor made it."""

import contextlib
from typing import Any

import openai
import trio
from langgraph_sdk import get_sync_client
from node import node
from raw import wait_until

from agentsse import RunContext, agent
from agentsse.testing import open_server

PATIENCE = 60  # seconds; nothing here takes ten


@agent
async def endless(run: RunContext, _input: Any) -> None:
    """Say something, and wait to be cancelled."""
    run.text("I begin.")
    await trio.sleep_forever()


async def test_a_run_is_started_by_one_sdk_watched_by_others_and_stopped_by_another():
    """OpenAI's starts it, AG-UI's, npm's EventSource and LangGraph's watch, LangGraph's stops it.

    Each has seen what was said, and that it was cancelled, in the words of its protocol; OpenAI's,
    asked again, as well.
    """
    with trio.fail_after(PATIENCE):
        async with (
            open_server(endless) as server,
            node("agui.mjs", "@ag-ui/client") as agui,
            node("eventsource.mjs", "listen") as eventsource,
            contextlib.AsyncExitStack() as stack,
        ):
            url = server.urls[0]
            openai_client = stack.enter_context(
                openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
            )
            langgraph = stack.enter_context(get_sync_client(url=f"{url}/langgraph", api_key="x"))
            started = await trio.to_thread.run_sync(
                lambda: openai_client.responses.create(
                    model="endless", input="Go.", background=True
                )
            )
            run_id = started.id.removeprefix("resp_")
            run = server.runs.find(run_id)
            seen: dict[str, Any] = {}

            async def watch_by_agui() -> None:
                seen["agui"] = await agui.ask(
                    do="run", name=run_id, url=f"{url}/agui/endless", runId=run_id
                )

            async def watch_by_eventsource() -> None:
                await eventsource.tell(
                    do="follow",
                    name="e",
                    url=f"{url}/runs/{run_id}/events",
                    types=["part_delta", "run_finished"],
                    until=["run_finished"],
                )
                told = [await eventsource.hear()]
                while told[-1].get("state") != "closed":
                    told.append(await eventsource.hear())
                seen["eventsource"] = [each["seen"]["data"] for each in told if "seen" in each]

            async def watch_by_langgraph() -> None:
                def read() -> list[tuple[str, Any]]:
                    stream = langgraph.runs.join_stream(run_id, run_id, last_event_id="-1")
                    return [(part.event, part.data) for part in stream]

                seen["langgraph"] = await trio.to_thread.run_sync(read)

            async with trio.open_nursery() as nursery:
                for watch in (watch_by_agui, watch_by_eventsource, watch_by_langgraph):
                    nursery.start_soon(watch)
                await wait_until(lambda: server.app.streams.open == 3)
                await trio.to_thread.run_sync(
                    lambda: langgraph.runs.cancel(run_id, run_id, wait=True)
                )
            asked = await trio.to_thread.run_sync(
                lambda: openai_client.responses.retrieve(started.id)
            )

    assert ("cancelled", "client_cancel") == (run.end.outcome, run.end.receipt.cause)
    assert ("in_progress", "cancelled") == (started.status, asked.status)
    assert "I begin." == asked.output_text
    assert ["assistant", "I begin."] == [
        seen["agui"]["messages"][-1][field] for field in ("role", "content")
    ]
    assert ("cancelled", []) == (seen["agui"].get("outcome"), seen["agui"]["complaints"])
    assert '"delta":"I begin."' in seen["eventsource"][0]
    assert '"outcome":"cancelled"' in seen["eventsource"][-1]
    names = [name for name, _ in seen["langgraph"]]
    assert ("metadata", "error") == (names[0], names[-1])
    assert "I begin." in str(seen["langgraph"])
