"""How a planner's weights get to the server that draws its turns: through a folder that both read,
on a route that the configuration states, and the server is asked afterwards whether it has them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flowkern.agent.network import FailedCall, line, parsed
from flowkern.checks import ConfigError, shown

if TYPE_CHECKING:
    import httpx2

    from flowkern.agent.engines.connection import Connection

KEY = "agent.engine.weights"


class Route(Protocol):
    async def bring(
        self, client: httpx2.AsyncClient, model: Any, tokenizer: Any, directory: Path
    ) -> None:
        """Raises FailedCall where the server does not have them afterwards."""

    async def current(self, client: httpx2.AsyncClient) -> dict[str, str]:
        """The fields of a request that name the newest weights."""


def route(server: Connection, model: Any) -> Route:
    """Raises ConfigError where the kind of weights and the route do not fit."""
    adapted = hasattr(model, "peft_config")
    if server.options.weights == "lora":
        if not adapted:
            raise ConfigError(f"{KEY}: got 'lora', but all weights are trained (lora: null)")
        return Adapter(server)
    if adapted:
        raise ConfigError(f"{KEY}: got 'disk', but a LoRA is trained; expected lora")
    return Disk(server)


def checksum(tensors: Iterable[Tensor]) -> list[int]:
    """Of their bits, in the manner of Fletcher's: sums of the values, and of the values times their
    places, modulo 2**64, of parts that take little memory."""
    sums = []
    for tensor in tensors:
        values = tensor.detach().flatten().view(_INTEGER[tensor.element_size()])
        for part in values.split(PART):
            part = part.long()
            place = torch.arange(len(part), device=part.device)
            sums += [part.sum(), (part * place).sum()]
    return torch.stack(sums).tolist()


PART = 2**22
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Shared:
    """The folder that trainer and server both read."""

    def __init__(self, server: Connection) -> None:
        self.server, self.options = server, server.options

    def folder(self, directory: Path) -> Path:
        return Path(self.options.folder or directory / "server").absolute()

    def there(self, path: Path) -> str:
        """What the server calls it."""
        if self.options.folder_on_server is None:
            return str(path)
        return str(PurePosixPath(self.options.folder_on_server) / path.name)

    def numbered(self, number: int, directory: Path) -> Path:
        """A new folder of weights."""
        path = self.folder(directory) / f"{self.options.name}-{number:06d}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def number(self, name: Any) -> int:
        """Of an adapter or a folder of this run; -1 of another."""
        start, _, end = str(name).rpartition("/")[2].rpartition("-")
        return int(end) if start == self.options.name and end.isdecimal() else -1

    def forget(self, directory: Path, newest: int) -> None:
        """Folders of earlier weights, which the server no longer reads."""
        for path in self.folder(directory).iterdir():
            if 0 <= self.number(path.name) < newest:
                shutil.rmtree(path, ignore_errors=True)


class Adapter(_Shared):
    """A LoRA under a new name each time: what a server has computed of a prompt it keeps by the
    adapter's name, and would go on with that of old weights."""

    @property
    def _is(self) -> str:
        return self.options.serves

    async def _post(self, client: httpx2.AsyncClient, verb: str, body: dict[str, str]) -> None:
        start = "/v1" if self._is == "vllm" else ""
        await self.server.ask(client, "POST", f"{start}/{verb}_lora_adapter", body)

    async def _there(self, client: httpx2.AsyncClient) -> dict[int, dict[str, Any]]:
        """This run's adapters, by number, as the server has them."""
        cards = await self.server.models(client)
        return {n: card for card in cards if (n := self.number(card.get("id"))) >= 0}

    async def current(self, client: httpx2.AsyncClient) -> dict[str, str]:
        there = await self._there(client)
        if not there:
            raise RuntimeError(
                f"{self.server.root} has no adapter {self.options.name}-N: it was started anew "
                "since; go on with train.resume_from_checkpoint=latest"
            )
        return self._named(f"{self.options.name}-{max(there):06d}")

    def _named(self, name: str) -> dict[str, str]:
        if self._is == "vllm":
            return {"model": name}
        return {"model": self.options.model, "lora_path": name}

    async def bring(
        self, client: httpx2.AsyncClient, model: Any, tokenizer: Any, directory: Path
    ) -> None:
        before = await self._there(client)
        number = max(before, default=-1) + 1
        path = self.numbered(number, directory)
        model.save_pretrained(path)
        name = path.name
        said = None
        try:
            await self._post(client, "load", {"lora_name": name, "lora_path": self.there(path)})
        except FailedCall as error:  # which it may have loaded all the same, an attempt before
            said = error
        card = (await self._there(client)).get(number)
        if card is None:
            raise FailedCall(f"{said or 'it does not list ' + name} ({_NEEDS[self._is]})") from said
        if card.get("root") not in (None, self.there(path)):
            raise FailedCall(f"it has {name} from {card['root']}, not from {self.there(path)}")
        for old in before:
            await self._post(client, "unload", {"lora_name": f"{self.options.name}-{old:06d}"})
        self.forget(directory, number)


_NEEDS = {
    "vllm": "vLLM needs --enable-lora, --max-lora-rank, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and "
    "the folder",
    "sglang": "SGLang needs --enable-lora, --max-lora-rank, --lora-target-modules, and the folder",
}


class Disk(_Shared):
    """All weights, in Hugging Face's layout (SGLang)."""

    async def _reads(self, client: httpx2.AsyncClient) -> str:
        """The folder that the server has its weights from."""
        try:
            said = await self.server.ask(client, "GET", "/model_info")
        except FailedCall:  # as it was called before
            said = await self.server.ask(client, "GET", "/get_model_info")
        info = parsed(said)
        path = info.get("model_path") if isinstance(info, dict) else None
        if not isinstance(path, str):
            raise FailedCall("it does not say which weights it has (model_path)")
        return path

    async def current(self, client: httpx2.AsyncClient) -> dict[str, str]:
        reads = await self._reads(client)
        if self.number(reads) < 0:
            raise RuntimeError(
                f"{self.server.root} has the weights of {reads}: it was started anew since; go on "
                "with train.resume_from_checkpoint=latest"
            )
        return {"model": self.options.model}

    async def bring(
        self, client: httpx2.AsyncClient, model: Any, tokenizer: Any, directory: Path
    ) -> None:
        number = self.number(await self._reads(client)) + 1
        path = self.numbered(number, directory)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        body = {"model_path": self.there(path), "flush_cache": True}
        said = parsed(await self.server.ask(client, "POST", "/update_weights_from_disk", body))
        if not isinstance(said, dict) or said.get("success") is not True:
            raise FailedCall(line(f"it said {shown(said)}"))
        reads = await self._reads(client)
        if reads != self.there(path):
            raise FailedCall(f"it has the weights of {reads}, not of {self.there(path)}")
        self.forget(directory, number)
