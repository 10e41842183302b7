"""What the compiled search needs of the machine and numba has no word for.

Each is code that numba puts in place of a call; none can be called from Python.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["pointer", "prefetch", "wide"]


def _pointer(typing: Any, address: Any, like: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    to: Any = types.CPointer
    return to(like.dtype)(types.int64, like), code


def _prefetch(typing: Any, array: Any, place: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        )
        to_read_soon = [ir.Constant(number, k) for k in (0, 3, 1)]
        builder.call(function, [builder.bitcast(builder.gep(data, [args[1]]), byte), *to_read_soon])
        return context.get_dummy_value()

    return types.void(array, types.uint64), code


def _wide(typing: Any, weight: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if weight == types.float32:
            return args[0]
        number, real = ir.IntType(32), ir.FloatType()
        bits = builder.zext(args[0], number)
        size = builder.shl(builder.and_(bits, number(0x7FFF)), number(13))
        sign = builder.shl(builder.and_(bits, number(0x8000)), number(16))
        scaled = builder.fmul(builder.bitcast(size, real), real(2.0**112))  # exponents count from 127, not 15
        return builder.bitcast(builder.or_(builder.bitcast(scaled, number), sign), real)

    return types.float32(weight), code


# pointer(address, like): an address as a pointer to values of the type, or the array's type, ``like``.
pointer: Any = intrinsic(_pointer)
# prefetch(array, place): ask for an array's value at a place, which will be read soon; may be past its end.
prefetch: Any = intrinsic(_prefetch)
# wide(weight): a float32 as it is; the 16 bits of a finite float16, a whole number, as float32.
wide: Any = intrinsic(_wide)
