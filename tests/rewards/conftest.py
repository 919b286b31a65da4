"""A server without a port: the transport of a reward's client, in the place of the network."""

import dataclasses
import json

import pytest


async def at_once(seconds):
    pass


@pytest.fixture
def served():
    """served(reward, answer) -> the requests that it made, as they come.

    answer: request -> (status, what is sent as JSON).
    """
    httpx2 = pytest.importorskip("httpx2")

    def serve(reward, answer):
        requests = []

        def handle(request):
            requests.append(request)
            status, body = answer(json.loads(request.content))
            return httpx2.Response(status, json=body)

        reward.server = dataclasses.replace(
            reward.server, transport=httpx2.MockTransport(handle), sleep=at_once
        )
        return requests

    return serve
