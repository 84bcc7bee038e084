"""Triton's interpreter as the kernels' tests want it."""

import dataclasses

import numpy as np


def prepare() -> None:
    """A fifth of the time, and products whose rounding is not the processor's.

    The interpreter puts its language in place at every launch and at every call of a function by a
    kernel, and takes it away again; once for each module is enough, in a process of its own.
    Products are summed in float64 and rounded once: in float32 their error is that of the
    processor's BLAS, in the order that it likes to sum in; where 64 reflections follow one another,
    1e-5 on one machine and 5e-5 on the next.
    """
    from triton.runtime import interpreter

    patched: set[int] = set()
    patch_lang = interpreter._patch_lang

    def patch_once(fn):
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            return patch_lang(fn)
        return interpreter._LangPatchScope()

    def call(self, *args, **options):
        interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **options)

    def dot(self, a, b, d, *precision):
        wide = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(wide.astype(d.data.dtype), d.dtype.scalar)

    if hasattr(interpreter, "quick"):
        return
    interpreter.quick = True
    interpreter._patch_lang = patch_once
    interpreter._LangPatchScope.restore = lambda self: None
    interpreter.InterpretedFunction.__call__ = call
    interpreter.InterpreterBuilder.create_dot = dot
    _call_at_once(interpreter)
    _remember_types(interpreter)
    _remember_operands(interpreter)


def _call_at_once(interpreter) -> None:
    """A function of the language without what is around it: its checks, and a copy of its names."""
    from triton.language import core

    semantic, unwrap = interpreter.interpreter_semantic, core._unwrap_if_constexpr
    plain = {core.tensor, core.dtype, int, float, bool, type(None)}

    def patch_attr(obj, name, member, builder, scope):
        function = getattr(member, "__wrapped__", member)

        def call(*args, **options):
            options["_semantic"] = semantic
            return function(*args, **options)

        scope.set_attr(obj, name, call)

    def unwrapped(given):
        return given if type(given) in plain else unwrap(given)

    interpreter._patch_attr = patch_attr
    core._unwrap_if_constexpr = unwrapped


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


def _remember_operands(interpreter) -> None:
    """What two operands are cast to, and which shape they are spread to, follows from their types:
    found out once. NumPy spreads them itself.
    """
    from triton.language import core

    semantic = interpreter.interpreter_semantic
    find_out, plans = semantic.binary_op_type_checking_impl, {}

    def kind(given):
        return given.type.name if type(given) is core.tensor else repr(given)

    def plan(given, found):
        """The operand itself if it is a number; or what it is cast to, if it is, and its type."""
        if type(given) is not core.tensor:
            return found, None, None
        return None, None if found.dtype == given.dtype else found.dtype, found.type

    def follow(given, number, cast, type):
        if number is not None:
            return number
        given = given if cast is None else semantic.cast(given, cast)
        return given if given.type.name == type.name else core.tensor(given.handle, type)

    def operands(one, two, *how, **more):
        key = kind(one), kind(two), how, *more.items()
        if key not in plans:
            found = find_out(one, two, *how, **more)
            plans[key] = [plan(*pair) for pair in zip((one, two), found)]
            return found
        first, second = plans[key]
        return follow(one, *first), follow(two, *second)

    semantic.binary_op_type_checking_impl = operands
