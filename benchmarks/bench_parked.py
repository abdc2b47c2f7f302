"""What a parked call costs: thousands of callers that wait for one batch, beside the least that is possible.

Each case runs in a process of its own, against a local emulator whose batches take half a second. The floors make the
same calls through a transport that only holds them and then answers: no engine, no store, no network. What is above a
floor is what presort costs; what is below it is LangChain's and the SDK's own.

    python benchmarks/bench_parked.py [--calls 5000] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent.parent / "src"
BATCH_SECONDS = 0.5
PROMPT = "Classify document {}: " + "lorem ipsum dolor sit amet " * 20

CASES = {
    "LangChain floor": ("langchain", False),
    "LangChain presort": ("langchain", True),
    "LangChain presort, sync": ("langchain-sync", True),
    "SDK floor": ("sdk", False),
    "SDK presort": ("sdk", True),
}


def answer(model: str) -> bytes:
    """Write an answer of the size that the emulator gives."""
    message = {"role": "assistant", "content": "x" * 200, "refusal": None, "annotations": []}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 150, "completion_tokens": 50, "total_tokens": 200},
    }
    return json.dumps(body).encode()


def holding_client(calls: int) -> Any:
    """Make an HTTP client that holds calls until all are there, and answers them half a second later."""
    import httpx2

    class Holding(httpx2.AsyncBaseTransport):
        def __init__(self) -> None:
            self.waiting: list[asyncio.Future[None]] = []

        async def handle_async_request(self, _request: httpx2.Request) -> httpx2.Response:
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            self.waiting.append(future)
            if len(self.waiting) == calls:
                loop.call_later(BATCH_SECONDS, self.release)
            await future
            return httpx2.Response(200, headers={"content-type": "application/json"}, content=answer("gpt-5.4-mini"))

        def release(self) -> None:
            for future in self.waiting:
                future.set_result(None)

    return httpx2.AsyncClient(transport=Holding())


async def run_sdk(url: str, calls: int, prompts: list[str], *, presorted: bool) -> list[Any]:
    """Make the calls with the plain SDK."""
    import openai

    http = {} if presorted else {"http_client": holding_client(calls)}
    client = openai.AsyncOpenAI(api_key="k", base_url=f"{url}/v1", **http)
    if presorted:
        import presort

        client = presort.wrap(client)

    async def ask(prompt: str) -> Any:
        return await client.chat.completions.create(
            model="gpt-5.4-mini", messages=[{"role": "user", "content": prompt}]
        )

    if not presorted:
        return await asyncio.gather(*(ask(prompt) for prompt in prompts))
    with presort.batch():
        return await asyncio.gather(*(ask(prompt) for prompt in prompts))


def chat_model(url: str, calls: int, *, presorted: bool) -> Any:
    """Make LangChain's model."""
    from langchain_openai import ChatOpenAI

    if not presorted:
        return ChatOpenAI(model="gpt-5.4-mini", api_key="k", http_async_client=holding_client(calls))
    from presort import OptimizedLLMWrapper

    return OptimizedLLMWrapper(ChatOpenAI(model="gpt-5.4-mini", api_key="k", base_url=f"{url}/v1"))


def peak_mib() -> float:
    """Return this process's peak memory. Linux's `ru_maxrss` counts the parent's, too."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return usage / 1024 / (1024 if sys.platform == "darwin" else 1)


def measure(case: str, calls: int, url: str) -> dict[str, float]:
    """Run one case in this process."""
    what, presorted = CASES[case]
    prompts = [PROMPT.format(number) for number in range(calls)]
    with tempfile.TemporaryDirectory() as folder:
        if presorted:
            import presort

            # single calls trickle in; so many are a flush as the group of a list would be
            presort.configure(
                store=f"{folder}/presort.db", batching={"poll_interval_seconds": 0.1, "flush_requests": calls}
            )
        if what == "sdk":
            import openai  # noqa: F401 - importing is not what is measured

            work = lambda: asyncio.run(run_sdk(url, calls, prompts, presorted=presorted))  # noqa: E731
        else:
            model = chat_model(url, calls, presorted=presorted)
            if what == "langchain-sync":
                work = lambda: model.batch(prompts)  # noqa: E731
            else:
                work = lambda: asyncio.run(model.abatch(prompts))  # noqa: E731
        gc.collect()
        before_mib, cpu, wall = peak_mib(), time.process_time(), time.perf_counter()
        answers = work()
        result = {
            "wall_seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "peak_mib": peak_mib(),
            "before_mib": before_mib,
        }
        assert len(answers) == calls
        if presorted:
            presort.close()
    result["cpu_ms_per_call"] = result["cpu_seconds"] * 1000 / calls
    result["kib_per_call"] = (result["peak_mib"] - before_mib) * 1024 / calls
    return result


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.calls, options.url)))
        return
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    results: dict[str, dict[str, float]] = {}
    for case in CASES:
        command = [sys.executable, "-m", "presort.emulator", "--port", "0", "--batch-seconds", str(BATCH_SECONDS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as emulator:
            try:
                assert emulator.stdout is not None
                url = emulator.stdout.readline().strip().rsplit(" ", 1)[1]
                one = [sys.executable, __file__, "--case", case, "--calls", str(options.calls), "--url", url]
                done = subprocess.run(one, stdout=subprocess.PIPE, text=True, env=environment, check=True)
            finally:
                emulator.terminate()
        results[case] = json.loads(done.stdout)
    for case, result in results.items():
        floor = results[f"{case.split()[0]} floor"]
        result["cpu_ratio"] = result["cpu_seconds"] / floor["cpu_seconds"]
        result["memory_ratio"] = result["kib_per_call"] / floor["kib_per_call"]
    if options.json:
        print(json.dumps({"calls": options.calls, "cases": results}, indent=2))
        return
    columns = {
        "wall s": ("wall_seconds", 2),
        "CPU s": ("cpu_seconds", 2),
        "CPU ms/call": ("cpu_ms_per_call", 2),
        "CPU x floor": ("cpu_ratio", 2),
        "peak MiB": ("peak_mib", 0),
        "KiB/call": ("kib_per_call", 1),
        "mem x floor": ("memory_ratio", 2),
    }
    print(f"{options.calls} parked calls, a batch of {BATCH_SECONDS} s")
    print(f"{'':24}" + "".join(f"{title:>13}" for title in columns))
    for case, result in results.items():
        print(f"{case:24}" + "".join(f"{result[name]:13.{digits}f}" for name, digits in columns.values()))


if __name__ == "__main__":
    main()
