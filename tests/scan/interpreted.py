"""Triton's interpreter as the kernels' tests want it."""

import numpy as np


def prepare() -> None:
    """Half the time, and products whose rounding is not the processor's.

    The interpreter puts its language in place at every call of a function by a kernel; once for
    each launch and module is enough. Products are summed in float64 and rounded once: in float32
    their error is that of the processor's BLAS, in the order that it likes to sum in; where 64
    reflections follow one another, 1e-5 on one machine and 5e-5 on the next.
    """
    from triton.runtime import interpreter

    patched: set[int] = set()
    launch = interpreter.InterpretedFunction.run

    def run(self, *args, **options):
        patched.clear()
        return launch(self, *args, **options)

    def call(self, *args, **options):
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **options)

    def dot(self, a, b, d, *precision):
        wide = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(wide.astype(d.data.dtype), d.dtype.scalar)

    if hasattr(interpreter, "quick"):
        return
    interpreter.quick = True
    interpreter.InterpretedFunction.run = run
    interpreter.InterpretedFunction.__call__ = call
    interpreter.InterpreterBuilder.create_dot = dot
