"""Groups of processes, as a launcher starts them, forked from one that has imported what training
imports: that takes each process that is started seconds.

`with server("model") as run: run(2, "file.py", "argument")` runs the file in two processes, where
it may import this folder; pictures are not drawn.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent


@contextmanager
def server(model):
    """In a process of its own, which has read the pipeline in the directory `model`; what it is
    asked for runs in its children, seven minutes at most.
    """
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment["TOKENIZERS_PARALLELISM"] = "false"  # no threads where it forks
    said = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill
    process = subprocess.Popen(
        [sys.executable, __file__, model], env=os.environ | environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
    )  # fmt: skip

    def run(count: int, *command: object) -> None:
        process.stdin.write(json.dumps([count, *map(str, command)]) + "\n")
        process.stdin.flush()
        if process.stdout.readline() != "good\n":
            said.seek(0)
            raise AssertionError(said.read()[-3000:])

    with said, process:
        yield run
        process.stdin.close()


def group(count: int, file: str, *arguments: str) -> bool:
    """Whether all ended well; where one did not, the others, which wait for it, are ended. The
    store that they meet at is here, on a port that is free; its thread begins when they are there,
    since a fork takes along what a thread holds at that moment, for ever.
    """
    from torch.distributed import TCPStore

    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        children = set()
        for rank in range(count):
            pid = os.fork()
            children.add(pid)
            if pid == 0:
                door.close()
                os.environ |= {k: str(v) for k, v in {**shared, "RANK": rank}.items()}
                os.environ["LOCAL_RANK"] = str(rank)
                os.dup2(2, 1)  # the answer is the parent's
                signal.alarm(420)
                child(file, *arguments)
        options = {"is_master": True, "wait_for_workers": False}
        store = TCPStore("127.0.0.1", port, **options, master_listen_fd=os.dup(door.fileno()))
    is_good = True
    while children:
        pid, status = os.wait()
        children.remove(pid)
        if status and is_good:
            is_good = False
            print(f"ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr, flush=True)
            for other in children:
                os.kill(other, signal.SIGKILL)
    del store
    return is_good


def child(file: str, *arguments: str) -> None:
    """Ends the process, without what of its parent an exit would tidy away."""
    import faulthandler
    import traceback

    faulthandler.enable()  # a signal such as SIGSEGV says where it came
    faulthandler.register(signal.SIGALRM, chain=True)  # and one that waits for ever, where it does
    status = 1
    try:
        sys.argv = [file, *arguments]
        runpy.run_path(file, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    from conftest import CONFIG, TINY, without_drawing
    from loaded_once import LoadedOnce, read_once
    from torch import device
    from tqdm import tqdm

    import flowkern.models.sd3
    import flowkern.train.flow
    import flowkern.train.loop
    from flowkern.train.config import load_config
    from flowkern.train.prompts import draw_prompts, read_prompts

    tqdm.monitor_interval = 0  # is a thread
    without_drawing(setattr)
    read_once(setattr, Path(sys.argv[1]), LoadedOnce())
    config = load_config(CONFIG, [*TINY, f"model.path={sys.argv[1]}"])
    prompts = read_prompts(config.data.train_prompts)
    drawn = [prompts[place] for i in range(4) for place in draw_prompts(len(prompts), 4, 0, i)]
    model = flowkern.train.flow.load_pipeline(config, device("cpu"))
    model.encode([one["prompt"] for one in (*drawn, *read_prompts(config.data.test_prompts)[:6])])
    for line in sys.stdin:
        count, *command = json.loads(line)
        print("good" if group(count, *command) else "failed", flush=True)
