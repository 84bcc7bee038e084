"""Triton's interpreter as the kernels' tests want it."""

import dataclasses

import numpy as np


def prepare() -> None:
    """A quarter of the time, and products whose rounding is not the processor's.

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
    _remember_types(interpreter)


def _remember_types(interpreter) -> None:
    """What follows from a type or a shape alone is computed once, not for every value. Sums are not
    looked at for overflows, of which the interpreter tells nobody without its option `debug`.
    """
    from triton.language import core

    new_type, new_tensor = core.block_type.__init__, core.tensor.__init__
    shared_shape = interpreter.interpreter_semantic.broadcast_impl_value
    numpy_type = interpreter._get_np_dtype
    types, tensors, numpy_types = {}, {}, {}

    def block_type(self, element_ty, shape):
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in types:
            new_type(self, element_ty, shape)
            types[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = types[key]

    def tensor(self, handle, type):
        if type.name not in tensors:
            new_tensor(self, handle, type)
            tensors[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[type.name]

    def broadcast(a, b):
        blocks = a.type.is_block() and b.type.is_block()
        alike = blocks and a.type.shape.values == b.type.shape.values
        return (a, b) if alike else shared_shape(a, b)

    def np_dtype(type):
        if type.name not in numpy_types:
            numpy_types[type.name] = numpy_type(type)
        return numpy_types[type.name]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    interpreter.interpreter_semantic.broadcast_impl_value = broadcast
    interpreter._get_np_dtype = np_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
