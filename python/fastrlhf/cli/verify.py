"""`fastrlhf verify`: whether the operations, and the seams of the frameworks installed here, are right on this machine.

Every operation is compared with its definition in float64 on inputs that have broken kernels elsewhere; it passes with at most
twice the error of plain float32 PyTorch, plus 1e-6, of gradients relative to the largest one. Every seam of a host is compared
with the host's own function: results, dtypes, gradients, errors. What cannot be compared is named, and not among what passed.
Exit status: 0 if all comparisons passed, 1 if not, 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import UserError
from ..integrations import HOSTS, host, patching
from ..integrations.seam import Host, Sizes
from ..verification.cases import Shapes, cases
from ..verification.checking import check
from ..verification.large import available_bytes, check_large
from ..verification.report import Findings
from ..verification.seams import Speed, check_seams
from .doctor import diagnose

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COPIES = (
    36  # of the logits in float32 are held at once, at most: the seam with several outputs, its gradient and the float64 run
)
DEFAULT = {"cpu": "4x128x32000", "cuda": "4x512x151936"}


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(list(argv))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    kind = torch.device(device).type
    shapes, note = fitting(parse_shapes(options.shapes or DEFAULT[kind]), device)
    hosts = chosen_hosts(options.host)
    if options.out:
        _check_out(Path(options.out))
    findings = verify(
        shapes, DTYPES[options.dtype], device, options.backend, hosts, options.hidden,
        measure=not options.no_speed, large=not options.no_large,
    )  # fmt: skip
    findings.notes += [note] if note else []
    if options.out:
        Path(options.out).write_text(json.dumps(findings.to_dict(), indent=1) + "\n")
    print(json.dumps(findings.to_dict(), indent=1) if options.json else findings)
    return 1 if findings.failed else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("fastrlhf verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--host", action="append", help=f"one of {', '.join(HOSTS)}, all or none; repeatable; default: those installed"
    )
    p.add_argument("--shapes", help="rows x tokens x vocabulary, as 8x1024x151936; default: 4x128x32000, on a GPU 4x512x151936")
    p.add_argument("--hidden", type=int, default=256, help="hidden size, for the seams that take hidden states")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of logits and hidden states")
    p.add_argument("--device", help="cpu, cuda or cuda:1; default: cuda where there is one")
    p.add_argument("--backend", help="cuda, triton, cpu or reference, for the operations; default: what is chosen here")
    p.add_argument("--no-speed", action="store_true", help="compare, do not time")
    p.add_argument("--no-large", action="store_true", help="leave out logits of more than 2^31 elements")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--out", help="write JSON to this file too")
    return p


def verify(
    shapes: Shapes, dtype: torch.dtype, device: str, backend: str | None, hosts: Sequence[Host], hidden: int, *,
    measure: bool, large: bool,
) -> Findings:  # fmt: skip
    """All comparisons; what fails is in the findings."""
    found = diagnose()
    kind = torch.device(device).type
    versions = dict(found["versions"]) | {h.name: patching.host_version(h) for h in hosts}
    findings = Findings(versions, device, str(dtype), str(shapes), {op: b[kind] for op, b in found["backends"].items()})
    for case in cases(shapes, dtype, device):
        findings.results.append(check(case, backend))
    if large:
        result = check_large(device, backend)
        if result is None:
            findings.notes.append("not compared: logits of more than 2^31 elements, for which memory does not suffice")
        else:
            findings.results.append(result)
    sizes = Sizes(shapes.rows, shapes.length, shapes.vocab, hidden, dtype, device)
    for h in hosts:
        for item in check_seams(h, sizes, measure=measure):
            if isinstance(item, Speed):
                findings.speeds.append(item)
            else:
                findings.results.append(item)
    return findings


def parse_shapes(text: str) -> Shapes:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise UserError(f"--shapes: expected rows x tokens x vocabulary, as 4x128x32000, got {text!r}")
    return Shapes(*map(int, parts))


def fitting(shapes: Shapes, device: str) -> tuple[Shapes, str]:
    """Rows cut, then tokens, until the float64 definitions of the largest inputs fit beside them; and a note that says so."""
    free = available_bytes(device) or math.inf
    if torch.device(device).type != "cpu":
        free = min(free, available_bytes("cpu") or math.inf)
    fits = min(shapes.rows * shapes.length, max(1, int(free / (COPIES * 4 * shapes.vocab))))
    if fits == shapes.rows * shapes.length:
        return shapes, ""
    rows = max(1, fits // shapes.length)
    cut = Shapes(rows, min(shapes.length, fits // rows), shapes.vocab)
    return cut, f"compared at {cut} instead of {shapes}: memory does not suffice for the definitions of more in float64"


def chosen_hosts(names: Sequence[str] | None) -> list[Host]:
    """Those named, which must be installed; of all, or where none is named, those that are."""
    for name in names or ():
        if name not in (*HOSTS, "all", "none"):
            raise UserError(f"--host: must be one of {', '.join(HOSTS)}, all or none, got {name!r}")
        if name in HOSTS and patching.host_version(host(name)) is None:
            raise UserError(f"--host: {name} is not installed here")
    if names is None or "all" in names:
        return [h for h in map(host, HOSTS) if patching.host_version(h) is not None]
    return [host(n) for n in HOSTS if n in names]


def _check_out(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--out: expected a file in a folder that exists, got {str(path)!r}")


def _check_device(device: str) -> None:
    try:
        if torch.empty(1, device=device).device.type not in DEFAULT:
            raise ValueError(f"expected one of {', '.join(DEFAULT)}")
    except Exception as error:
        raise UserError(f"--device: {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
