"""Pick an agent for a request with a trained reward model: python examples/search_agents.py MODEL REQUEST..."""

import asyncio
import sys

from rmsearch import Search
from rmsearch.datasets.beir import load_beir

agents = list(load_beir("demo", "test").corpus.values())


async def main(model: str, requests: list[str]) -> None:
    async with Search(model) as search:
        for result in await search(requests, [agent.key for agent in agents], k=3):
            print(f"\n{result['query']}")
            for key in result["keys"]:
                print(f"  {key['relevance']:+7.2f}  {agents[key['key_id']].title}")


asyncio.run(main(sys.argv[1], sys.argv[2:]))
