"""Start several processes as `torchrun` does, forked from this one to avoid importing everything again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from accelerate.commands import launch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch import distributed

from catpo.runtime import work_group

fork = multiprocessing.get_context("fork")


def together(count: int, function: Callable[[], Any], **environment: str) -> list[Any]:
    """Run `function` in `count` processes and return all results; if one fails, end the others, as a launcher does.

    Raises:
        AssertionError: a process failed; with its traceback.
    """
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), **environment}
    pipes = [fork.Pipe(duplex=False) for _ in range(count)]
    started = []
    for number, (_, write) in enumerate(pipes):
        ranks = {"RANK": str(number), "LOCAL_RANK": str(number)}
        started.append(fork.Process(target=_run, args=(function, {**common, **ranks}, write)))
        started[-1].start()
        write.close()
    results: dict[int, Any] = {}
    try:
        while len(results) < count:
            for read in wait([read for number, (read, _) in enumerate(pipes) if number not in results], timeout=600) or [None]:
                assert read is not None, "deadlock: the processes wait for one another"
                number = [each for each, _ in pipes].index(read)
                is_done, results[number] = read.recv()
                assert is_done, f"process {number} of {count}:\n{results[number]}"
    finally:
        for process in started:
            process.kill() if len(results) < count else None
            process.join()
    return [results[number] for number in range(count)]


def environment_of(recipe: str | Path) -> dict[str, str]:
    """Environment that `accelerate launch --config_file RECIPE` sets for its processes, changed to run on CPUs."""
    given = ["--config_file", str(recipe), "--num_processes", "2", "-m", "catpo"]
    if (beside := Path(recipe).with_suffix(".json")).is_file():
        given = ["--deepspeed_config_file", str(beside), *given]
    arguments = launch.launch_command_parser().parse_args(given)
    arguments, defaults, _ = launch._validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, made = prepare_deepspeed_cmd_env(arguments)
    else:
        made = prepare_multi_gpu_env(arguments)
    set_here = {name: value for name, value in made.items() if os.environ.get(name) != value and name != "PYTHONPATH"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # DeepSpeed calls ninja
    return {**set_here, "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "PATH": path}


def _let_engines_take_cpus() -> None:
    """Pretend to have GPUs: accelerate 1.15 disables FSDP on CPUs and counts a single process under DeepSpeed."""
    distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def _run(function: Callable[[], Any], environment: dict[str, str], write: Any) -> None:
    os.environ.update(environment)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    work_group._common_store.cache_clear()
    if "ACCELERATE_USE_FSDP" in environment or "ACCELERATE_USE_DEEPSPEED" in environment:
        _let_engines_take_cpus()
    try:
        write.send((True, function()))
    except BaseException:
        write.send((False, traceback.format_exc()))
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        write.close()
        os._exit(0)  # skip the cleanup of the parent test run


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
