"""Anonymous memory while a corpus is prepared: the same at twice the size?

    python benchmarks/preparing_memory.py --tokenizer SmolLM2-135M-Instruct.gguf --out memory.json

A corpus is one text file made of the standard library's lines, shuffled with a fixed seed again
and again. Each is prepared in a fresh process, at half its size and whole: 2 GB with the
built-in byte tokenizer, 200 MB with the tokenizer given. Another process samples the anonymous
resident memory (RssAnon, Linux) of that process and its children all the while; what it held
after its imports and with the tokenizer loaded, just before, is the idle process. Corpora and
tokens are deleted as soon as they were measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

from scrimp.data import byte_tokenizer, find_sources, load_tokenizer, prepare

SAMPLE_SECONDS = 0.01
SEED = 0
BYTES_TOKENIZER = "bytes"


def main() -> None:
    """Measure all corpora and write what was found, or (--prepare) prepare one in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer", help="folder, tokenizer.json or GGUF file; left out, only bytes are measured"
    )
    parser.add_argument("--bytes-megabytes", type=int, default=2000, help="size of the corpus for bytes")
    parser.add_argument("--tokenizer-megabytes", type=int, default=200, help="size of the other one")
    parser.add_argument(
        "--scratch", type=Path, help="folder for corpora and tokens (about three times the size)"
    )
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    parser.add_argument(
        "--prepare", nargs=3, metavar=("TOKENIZER", "CORPUS", "CACHE"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.prepare:
        prepare_here(*options.prepare)
        return
    plan = [(BYTES_TOKENIZER, options.bytes_megabytes)]
    plan += [(options.tokenizer, options.tokenizer_megabytes)] if options.tokenizer else []
    result = {
        "what": "anonymous memory of the process and its children while preparing, above idle",
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "numpy")},
        "runs": [
            measure(tokenizer, size, options.scratch)
            for tokenizer, whole in plan
            for size in (whole // 2, whole)
        ],
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", "utf-8")


def make_corpus(path: Path, megabytes: int) -> None:
    """Write lines of the default text in shuffled order until the file has its size."""
    texts = (source.path.read_bytes() for source in find_sources().files)
    lines = np.array(
        [line for text in texts if is_utf8(text) for line in text.splitlines(keepends=True)], object
    )
    generator = np.random.default_rng(SEED)
    with path.open("wb") as file:
        while (left := megabytes * 10**6 - file.tell()) > 0:
            shuffled = b"".join(lines[generator.permutation(len(lines))])
            # Up to a line end, so that no character is cut.
            file.write(shuffled if len(shuffled) <= left else shuffled[: shuffled.index(b"\n", left) + 1])


def is_utf8(text: bytes) -> bool:
    """Tell whether bytes are UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def measure(tokenizer: str, megabytes: int, scratch: Path | None) -> dict[str, object]:
    """Prepare one corpus in a fresh process and return its memory in MB (10^6 bytes)."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        corpus = Path(folder) / "corpus.txt"
        make_corpus(corpus, megabytes)
        command = [sys.executable, __file__, "--prepare", tokenizer, str(corpus), str(Path(folder) / "cache")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdout.readline()  # imports are done and the tokenizer is loaded
            idle = peak = anonymous_bytes(process.pid)
            start = time.perf_counter()
            process.stdin.write("go\n")
            process.stdin.flush()
            samples = 0
            while process.poll() is None:
                peak = max(peak, anonymous_bytes(process.pid))
                samples += 1
                time.sleep(SAMPLE_SECONDS)
            seconds = time.perf_counter() - start
            lines = process.stdout.read().splitlines()
        if process.returncode:
            raise SystemExit(f"preparing {megabytes} MB failed with exit code {process.returncode}")
    return {
        "tokenizer": Path(tokenizer).name,
        "corpus_megabytes": megabytes,
        **json.loads(lines[-1]),
        "idle_megabytes": idle / 1e6,
        "peak_megabytes": peak / 1e6,
        "above_idle_megabytes": (peak - idle) / 1e6,
        "seconds": seconds,
        "samples": samples,
        "load": os.getloadavg()[0],
    }


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous resident bytes of a process and all its descendants."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for member in family:
            status = Path(f"/proc/{member.pid}/status").read_text()
            found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
            total += 1024 * int(found[0]) if found else 0  # a process that has just ended has no such line
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        pass  # it ended while it was looked at: what was added up so far stands
    return total


def prepare_here(tokenizer_path: str, corpus: str, cache: str) -> None:
    """Load the tokenizer, wait for a word on standard input, prepare, and print what came of it."""
    tokenizer = byte_tokenizer() if tokenizer_path == BYTES_TOKENIZER else load_tokenizer(tokenizer_path)
    print("ready", flush=True)
    sys.stdin.readline()
    report = prepare(find_sources([corpus]), tokenizer, cache=Path(cache)).report
    print(json.dumps({"documents": report.documents, "tokens": report.tokens}), flush=True)


if __name__ == "__main__":
    main()
