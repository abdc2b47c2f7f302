"""Grade answers overnight: many calls of a plain client, batched, in a run that may be killed and started again.

    ANTHROPIC_API_KEY=… python examples/evaluate.py

To try it without a key: `presort emulator --port 8421` in another terminal, then

    ANTHROPIC_API_KEY=any ANTHROPIC_BASE_URL=http://127.0.0.1:8421 PRESORT_BATCHING__POLL_INTERVAL_SECONDS=1 \
        PRESORT_STORE=/tmp/presort-example.db python examples/evaluate.py
"""

from __future__ import annotations

import asyncio

import anthropic

import presort

RUN = "grades"

ANSWERS = {
    "Why is the sky blue?": "Because the sea is reflected in it.",
    "Why does ice float?": "Because it is less dense than water.",
    "Why is it dark at night?": "Because the sun is on the other side of the earth.",
}


async def grade(client: anthropic.AsyncAnthropic, question: str, answer: str) -> str:
    message = await client.messages.create(
        model="claude-haiku-5-5",
        max_tokens=300,
        system="Grade the answer from 1 to 5, and say why in one sentence.",
        messages=[{"role": "user", "content": f"Question: {question}\nAnswer: {answer}"}],
    )
    return "".join(block.text for block in message.content if block.type == "text")


async def main() -> None:
    client = presort.wrap(anthropic.AsyncAnthropic())
    with presort.run(RUN), presort.batch(deadline=12 * 3600):
        grades = await asyncio.gather(*(grade(client, *pair) for pair in ANSWERS.items()))
    for question, text in zip(ANSWERS, grades, strict=True):
        print(f"{question}\n  {text}")
    presort.finish_run(RUN)


asyncio.run(main())
