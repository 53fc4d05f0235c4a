"""A real ComfyUI in this process: prompts run through its own executor, no port is opened."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import stand_ins

ROOT = Path(__file__).parents[2]
PACK = "ComfyUI-DiffLoRA"
Prompt = dict[str, dict[str, Any]]


class PromptFailed(Exception):
    """A prompt that ComfyUI refused or that ended with an error; carries ComfyUI's sentence."""

    def __init__(self, message: str, node: str = "") -> None:
        super().__init__(message)
        self.node = node


class Interrupted(Exception):
    """A prompt that was cancelled."""


def find_comfyui() -> Path | None:
    """The ComfyUI checkout to test in, or None."""
    path = Path(os.environ.get("COMFYUI_PATH", ""))
    return path.resolve() if (path / "comfy" / "sd.py").is_file() else None


@contextlib.contextmanager
def blocked(*packages: str) -> Iterator[None]:
    """Make packages look as if they were not installed."""
    present = {name: sys.modules[name] for name in packages if name in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(present)


class Host:
    """One ComfyUI with our pack loaded; `run` executes prompts in API format."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        self.base = base
        self.on_progress: Callable[[int], None] | None = None
        self.events: list[tuple[str, Any]] = []
        self._enter(comfyui, base)
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.executor = self._start()
        self.loop.run_until_complete(self._load_nodes())

    def _enter(self, comfyui: Path, base: Path) -> None:
        """Let `import nodes` mean ComfyUI's module, and its arguments be ours."""
        sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
        sys.path.insert(0, str(comfyui))
        sys.path.append(str(ROOT))
        for folder in ("custom_nodes", "input", "output", "temp", "user", "models/loras"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        sys.argv = ["main.py", "--cpu", "--base-directory", str(base), "--disable-api-nodes"]
        if "database-url" in (comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8"):
            sys.argv += ["--database-url", "sqlite:///:memory:"]
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("utils.extra_config")

    def _start(self) -> Any:
        execution = importlib.import_module("execution")
        server = importlib.import_module("server").PromptServer(self.loop)
        server.send_sync = self._event
        importlib.import_module("comfy.utils").set_progress_bar_global_hook(self._progress)
        sizes = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        with contextlib.suppress(TypeError):
            return execution.PromptExecutor(server, cache_args=sizes)
        return execution.PromptExecutor(server)

    async def _load_nodes(self) -> None:
        nodes = importlib.import_module("nodes")
        await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
        pack = self.base / "custom_nodes" / PACK
        pack.symlink_to(ROOT, target_is_directory=True)
        with blocked("insightface", "onnxruntime", "open_clip"):
            loaded = await nodes.load_custom_node(str(pack), module_parent="custom_nodes")
        if not loaded:
            raise RuntimeError("ComfyUI could not load the pack; see the log above")
        nodes.NODE_CLASS_MAPPINGS.update(stand_ins.NODES)
        self.pack_name = str(pack).replace(".", "_x_")
        self.nodes = nodes
        stand_ins.Person.features_type = self.module("difflora_core.features").Features

    def module(self, name: str) -> ModuleType:
        """A module of the pack as ComfyUI loaded it, such as "nodes.host"."""
        return sys.modules[f"{self.pack_name}.{name}"]

    def _event(self, event: str, data: Any, sid: str | None = None) -> None:
        self.events.append((event, data))

    def _progress(self, value: int, *_args: Any, **_more: Any) -> None:
        """What ComfyUI's main module does at every step of a progress bar."""
        if self.on_progress:
            self.on_progress(value)
        management = importlib.import_module("comfy.model_management")
        management.throw_exception_if_processing_interrupted()

    def run(self, prompt: Prompt) -> dict[str, Any]:
        """Execute a prompt; what its TestCapture nodes received, by name."""
        return self.loop.run_until_complete(self._run(prompt))

    async def _run(self, prompt: Prompt) -> dict[str, Any]:
        execution = importlib.import_module("execution")
        ident, self.events, stand_ins.Capture.values = uuid.uuid4().hex, [], {}
        valid, error, outputs, node_errors = await execution.validate_prompt(ident, prompt, None)
        if not valid:
            raise PromptFailed(f"{error} {node_errors}")
        data = {"client_id": "test"}
        await self.executor.execute_async(prompt, ident, data, outputs)
        self._raise_errors(dict(self.executor.status_messages))
        return stand_ins.Capture.values

    def _raise_errors(self, messages: dict[str, Any]) -> None:
        if "execution_interrupted" in messages:
            raise Interrupted
        if "execution_error" in messages:
            error = messages["execution_error"]
            raise PromptFailed(error["exception_message"].strip(), error["node_type"])

    def forget_outputs(self) -> None:
        """Empty the cache, so that the next prompt runs every node."""
        self.executor.reset()
