"""Checkpoints in the output folder (or beside an S3 output, synchronised): which are complete, which to resume from.

``checkpoint-N/`` is complete when it holds MARKER, which is written last and names the run it belongs to. ``.training``
holds the run's facts and the best weights so far; it is there only while a run is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from rmsearch.errors import ConfigError, InputMissingError
from rmsearch.models.contract import Contract, write_contract
from rmsearch.storage import uri
from rmsearch.storage.folders import cache_folder

MARKER = "rmsearch_checkpoint.json"
STATE = ".training"
_NUMBERED = re.compile(r"checkpoint-(\d+)")


class Checkpoints:
    """The checkpoints of one run of a training stage.

    output: the model folder, a path or s3:// URI. work: the local folder where the trainer writes; the output itself
    when that is local. contract: goes into every checkpoint, so that each can be converted and used.
    """

    def __init__(self, output: str, fingerprint: str, settings: dict[str, Any], contract: Contract) -> None:
        self.output, self.fingerprint, self.settings = output.rstrip("/"), fingerprint, settings
        self.contract = contract
        self.remote = uri.is_s3(output)
        mark = hashlib.sha256(f"{self.output} {fingerprint}".encode()).hexdigest()[:24]
        self.work = cache_folder() / "training" / mark if self.remote else Path(output).expanduser()

    def open(self, *, anew: bool) -> Path | None:
        """The newest complete checkpoint of this run, or None for a start from the beginning.

        Broken checkpoints go, and those of a finished other run too. An unfinished other run is a ConfigError, since
        hours of work may lie there; ``anew`` deletes it.
        """
        if self.remote:
            self._fetch(anew)
        self.work.mkdir(parents=True, exist_ok=True)
        state = self.work / STATE / "run.json"
        former = json.loads(state.read_text()) if state.exists() else None
        if former is not None and former["fingerprint"] != self.fingerprint and not anew:
            raise ConfigError(
                f"holds an unfinished training run with other settings ({self._changes(former['settings'])})",
                where=self.output,
                remedy="Give the same settings to go on, another --output-dir, or --force to delete it and start anew",
            )
        newest = None
        for folder in sorted(self.work.glob("checkpoint-*"), key=_number, reverse=True):
            if newest is None and not anew and self._is_mine(folder):
                newest = folder
            elif anew or not self._is_mine(folder):
                shutil.rmtree(folder)
        if anew or former is None or former["fingerprint"] != self.fingerprint:
            shutil.rmtree(self.work / STATE, ignore_errors=True)
        state.parent.mkdir(exist_ok=True)
        state.write_text(json.dumps({"fingerprint": self.fingerprint, "settings": self.settings}))
        if self.remote:
            self._send_state()
        return newest

    def _is_mine(self, folder: Path) -> bool:
        marker = folder / MARKER
        return marker.exists() and json.loads(marker.read_text())["fingerprint"] == self.fingerprint

    def _changes(self, former: dict[str, Any]) -> str:
        names = sorted(k for k in former.keys() | self.settings.keys() if former.get(k) != self.settings.get(k))
        return ", ".join(f"{n}: {former.get(n)} then, {self.settings.get(n)} now" for n in names[:3]) or "other inputs"

    def complete(self, step: int) -> None:
        """Marks checkpoint-``step`` as complete (and sends it to S3)."""
        folder = self.work / f"checkpoint-{step}"
        write_contract(folder, self.contract)
        temp = folder / f"{MARKER}.tmp"
        temp.write_text(json.dumps({"fingerprint": self.fingerprint, "step": step}))
        temp.rename(folder / MARKER)
        self.drop_best(but_last=True)  # not before: a run that resumes earlier may need an older one
        if not self.remote:
            return
        uri.upload_folder(folder, uri.join(self.output, folder.name))
        self._send_state()
        kept = {each.name for each in self.work.glob("checkpoint-*")}
        for name in self._remote_checkpoints() - kept:
            uri.remove(uri.join(self.output, name))

    def save_best(self, step: int, weights: dict[str, Any]) -> None:
        """Keeps the weights that learn, as the best so far."""
        from safetensors.torch import save_file

        folder = self.work / STATE
        folder.mkdir(exist_ok=True)
        temp = folder / "temp.safetensors"
        save_file(weights, temp, metadata={"format": "pt"})
        temp.rename(folder / f"best-{step}.safetensors")

    def _best_steps(self) -> list[int]:
        names = (self.work / STATE).glob("best-*.safetensors")
        return sorted(int(path.stem.partition("-")[2]) for path in names)

    def drop_best(self, *, after: int | None = None, but_last: bool = False) -> None:
        """Deletes best weights of steps after a checkpoint, or all but the last."""
        steps = self._best_steps()
        for step in [s for s in steps if after is not None and s > after] + (steps[:-1] if but_last else []):
            (self.work / STATE / f"best-{step}.safetensors").unlink(missing_ok=True)

    def best_weights(self, step: int) -> dict[str, Any]:
        """The kept weights of that step."""
        from safetensors.torch import load_file

        return load_file(self.work / STATE / f"best-{step}.safetensors")

    def finish(self) -> None:
        """The model is exported: forgets the best weights and the unfinished run; checkpoints stay."""
        shutil.rmtree(self.work / STATE, ignore_errors=True)
        if self.remote:
            uri.remove(uri.join(self.output, STATE))
            shutil.rmtree(self.work, ignore_errors=True)

    def _remote_checkpoints(self) -> set[str]:
        if not uri.is_folder(self.output):
            return set()
        tops = {each.removeprefix(self.output + "/").split("/")[0] for each in uri.list_files(self.output)}
        return {top for top in tops if _NUMBERED.fullmatch(top)}

    def _send_state(self) -> None:
        uri.upload_folder(self.work / STATE, uri.join(self.output, STATE))

    def _fetch(self, anew: bool) -> None:
        """Brings the newest complete remote checkpoint (and the best weights) here, unless it is here already."""
        if not uri.is_folder(self.output):
            return
        names = sorted(self._remote_checkpoints(), key=lambda name: -int(name.partition("-")[2]))
        if anew:
            for name in [*names, STATE]:
                uri.remove(uri.join(self.output, name))
            return
        for name in [*names[:2], STATE]:
            target = self.work / name
            try:
                fetched = uri.fetch_folder(uri.join(self.output, name))
            except InputMissingError:  # its upload broke off
                continue
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(fetched, target)


def _number(folder: Path) -> int:
    match = _NUMBERED.fullmatch(folder.name)
    return int(match[1]) if match else -1
