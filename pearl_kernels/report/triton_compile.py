"""The process that compiles Triton variants: ``python -m pearl_kernels.report.triton_compile``.

Reads one request a line from standard input, ``{"module": ..., "variant": ..., "arch": 90}``, and answers each with one
line: the fields of ``Usage``, or ``{"error": ...}``. A process of its own, because TRITON_INTERPRET, which must not be
set here, is decided when triton is imported, and because a compiler that crashes must not take the report with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pearl_kernels.report.resources import WARP, Usage, add_launch, read_log
from pearl_kernels.triton.variants import ALIGNED, Variant


def compile_variant(variant: Variant, arch: int) -> Usage:
    """What the variant takes on ``arch``. Raises what the compiler raises."""
    arguments = list(variant.signature)
    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs=dict(variant.constexprs),
        attrs={(arguments.index(name),): [["tt.divisibility", ALIGNED]] for name in variant.aligned},
    )
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # where TRITON_DUMP_PTXAS_LOG puts it
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", arch, WARP),
            options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
        )
    (usage,) = add_launch(read_log(log.getvalue()), compiled.asm["ptx"]).values()
    return dataclasses.replace(usage, dynamic_shared=compiled.metadata.shared)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        variants = {variant.name: variant for variant in importlib.import_module(request["module"]).VARIANTS}
        return dataclasses.asdict(compile_variant(variants[request["variant"]], request["arch"]))
    except Exception as error:  # whatever it is, the report has to tell it
        return {"error": f"{type(error).__name__}: {error}".strip()}


def main() -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what compilers print is not an answer
        for line in sys.stdin:
            answers.write(json.dumps(_answer(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
