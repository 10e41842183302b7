"""Vector operations for compiled loops that solve several nodes at once, a node a lane.

The nodes of a cluster share its documents.  With 16 of them side by side a document meets one
contiguous row of 16 weights for each of its words: its values are read once, not 16 times,
and every operation is one on vectors.  Compilers do not find this by themselves, since
pointers may alias, so these few operations are emitted as LLVM vectors.  Any processor runs
them; into how many instructions a vector falls is LLVM's affair.

``width`` is a tuple with a place for each lane: its length is part of its type, so the loops
are compiled for it.  A vector in memory is a run of as many numbers, float32 or float64; a set
of lanes is a uint16, lane 0 lowest.  No lane sees another's values, so a node's result does
not depend on its neighbours, nor on the number of lanes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils as _cgutils
from numba.extending import intrinsic as _intrinsic

__all__ = ["add_dense", "add_sparse", "dense_products", "dual_step", "prefetch", "prefetch_rows", "sparse_products"]

cgutils: Any = _cgutils  # numba tells no types of these
intrinsic: Any = _intrinsic

_CHAINS = 4  # sums that do not wait for each other
_FAST = ("contract",)  # multiply and add in one instruction
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_CACHE_LINE = 64  # bytes


class _Vectors:
    """Vectors of one kind, at the place of the program where ``b`` stands."""

    def __init__(self, b: ir.IRBuilder, lanes: int, array: Any) -> None:
        self.b, self.lanes = b, lanes
        self.element = ir.FloatType() if array.dtype == types.float32 else ir.DoubleType()
        self.type = ir.VectorType(self.element, lanes)
        self.align = array.dtype.bitwidth // 8  # arrays promise no more than that

    def at(self, data: Any, row: Any) -> Any:
        """The address of the ``row``-th vector of an array."""
        place = self.b.gep(data, [self.b.mul(row, ir.Constant(row.type, self.lanes))])
        return self.b.bitcast(place, self.type.as_pointer())

    def load(self, address: Any) -> Any:
        return self.b.load(address, align=self.align)

    def store(self, vector: Any, address: Any) -> None:
        self.b.store(vector, address, align=self.align)

    def every(self, value: float) -> Any:
        """A constant in every lane."""
        return ir.Constant(self.type, [value] * self.lanes)

    def repeat(self, scalar: Any) -> Any:
        """A number in every lane."""
        if isinstance(scalar.type, ir.FloatType) and isinstance(self.element, ir.DoubleType):
            scalar = self.b.fpext(scalar, self.element)
        elif isinstance(scalar.type, ir.DoubleType) and isinstance(self.element, ir.FloatType):
            scalar = self.b.fptrunc(scalar, self.element)
        nothing = ir.Constant(self.type, ir.Undefined)
        one = self.b.insert_element(nothing, scalar, _I32(0))
        return self.b.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes))

    def mask(self, lanes: Any) -> Any:
        """A set of lanes as a vector of truths."""
        if self.lanes < 16:
            lanes = self.b.trunc(lanes, ir.IntType(self.lanes))
        return self.b.bitcast(lanes, ir.VectorType(ir.IntType(1), self.lanes))

    def set_of(self, mask: Any) -> Any:
        """A vector of truths as a set of lanes."""
        lanes = self.b.bitcast(mask, ir.IntType(self.lanes))
        return lanes if self.lanes == 16 else self.b.zext(lanes, _I16)

    def add(self, a: Any, b: Any) -> Any:
        return self.b.fadd(a, b, flags=_FAST)

    def sub(self, a: Any, b: Any) -> Any:
        return self.b.fsub(a, b, flags=_FAST)

    def mul(self, a: Any, b: Any) -> Any:
        return self.b.fmul(a, b, flags=_FAST)

    def smaller(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered("<", a, b), a, b)

    def larger(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)


def _data(context: Any, b: ir.IRBuilder, signature: Any, args: Any, i: int) -> Any:
    """The address of an argument's first number."""
    return context.make_array(signature.args[i])(context, b, args[i]).data


def _column(b: ir.IRBuilder, cols: Any, k: Any) -> Any:
    """Column of the k-th value; values of all columns, one after the other, have no list of them."""
    return k if cols is None else b.zext(b.load(b.gep(cols, [k])), _I64)


def _products(v: _Vectors, cols: Any, vals: Any, begin: Any, end: Any, weights: Any, out: Any) -> None:
    b, out = v.b, v.at(out, _I64(0))
    sums = [cgutils.alloca_once(b, v.type) for _ in range(_CHAINS)]
    for start, chain in zip((v.load(out), *[v.every(0.0)] * (_CHAINS - 1)), sums, strict=True):
        b.store(start, chain)

    def add(k: Any, chain: Any) -> None:
        weight = v.load(v.at(weights, _column(b, cols, k)))
        b.store(v.add(v.mul(v.repeat(b.load(b.gep(vals, [k]))), weight), b.load(chain)), chain)

    whole = b.add(begin, b.and_(b.sub(end, begin), _I64(-_CHAINS)))
    with cgutils.for_range_slice(b, begin, whole, _I64(_CHAINS), _I64) as (k, _):
        for i, chain in enumerate(sums):
            add(b.add(k, _I64(i)), chain)
    with cgutils.for_range_slice(b, whole, end, _I64(1), _I64) as (k, _):
        add(k, sums[0])
    first, second, third, fourth = (b.load(chain) for chain in sums)
    v.store(v.add(v.add(first, second), v.add(third, fourth)), out)


def _additions(v: _Vectors, cols: Any, vals: Any, begin: Any, end: Any, weights: Any, step: Any) -> None:
    b, change = v.b, v.load(v.at(step, _I64(0)))
    with cgutils.for_range_slice(b, begin, end, _I64(1), _I64) as (k, _):
        weight = v.at(weights, _column(b, cols, k))
        v.store(v.add(v.mul(v.repeat(b.load(b.gep(vals, [k]))), change), v.load(weight)), weight)


def _over_words(emit: Any) -> Any:
    def typed(typingctx: Any, width: Any, cols: Any, vals: Any, begin: Any, end: Any, weights: Any, vector: Any) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            of_words, of_vals, of_weights, of_vector = (_data(context, b, signature, args, i) for i in (1, 2, 5, 6))
            emit(_Vectors(b, width.count, weights), of_words, of_vals, args[3], args[4], of_weights, of_vector)
            return context.get_dummy_value()

        return types.void(width, cols, vals, types.uint64, types.uint64, weights, vector), codegen

    return typed


def _over_all(emit: Any) -> Any:
    def typed(typingctx: Any, width: Any, row: Any, weights: Any, vector: Any) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            of_row, of_weights, of_vector = (_data(context, b, signature, args, i) for i in (1, 2, 3))
            shape = cgutils.unpack_tuple(b, context.make_array(row)(context, b, args[1]).shape)
            emit(_Vectors(b, width.count, weights), None, of_row, _I64(0), shape[0], of_weights, of_vector)
            return context.get_dummy_value()

        return types.void(width, row, weights, vector), codegen

    return typed


# sparse_products(width, cols, vals, begin, end, weights, out): out += values [begin, end) times their
# columns' rows of weights [F, lanes].  add_sparse(width, cols, vals, begin, end, weights, step): these
# rows += value * step.  dense_products(width, row, weights, out) and add_dense(width, row, weights,
# step): the same for a row of values of all columns.
sparse_products = intrinsic(_over_words(_products))
add_sparse = intrinsic(_over_words(_additions))
dense_products = intrinsic(_over_all(_products))
add_dense = intrinsic(_over_all(_additions))


@intrinsic
def dual_step(
    typingctx: Any,
    width: Any,
    active: Any,
    positive: Any,
    margin: Any,
    row: Any,
    alpha: Any,
    cost: Any,
    norm: Any,
    bounds: Any,
    hinge: Any,
    step: Any,
) -> Any:
    """One document's coordinate of the dual of every active lane, exactly minimised.

    Args (of the compiled function):
        active: lanes; positive: those for which the document is one.
        margin: ``w . x``.
        row: the document's row of alpha and cost ``[n, lanes]``.
        cost: squared hinge 1 / (2c), hinge c, which then is the upper bound of alpha.
        norm: ``||x||^2``.
        bounds: ``[4, lanes]``: shrink above, shrink below; highest and lowest projected gradient so far.
        hinge: the loss is not squared.
        step: receives y times the change of alpha, 0 for lanes that stay.

    Returns:
        uint32: lanes still active in the low half, lanes that moved in the high half.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, on, is_positive, _, at, _, _, square, _, not_squared, _ = args
        v = _Vectors(b, width.count, margin)
        of_margin, of_alpha, of_cost, of_bounds, of_step = (
            _data(context, b, signature, args, i) for i in (3, 5, 6, 8, 10)
        )
        zero, nowhere = v.every(0.0), v.every(float("inf"))
        y = b.select(v.mask(is_positive), v.every(1.0), v.every(-1.0))
        place = v.at(of_alpha, at)
        a, c = v.load(place), v.load(v.at(of_cost, at))
        diagonal, top = b.select(not_squared, zero, c), b.select(not_squared, c, nowhere)
        above, below, high, low = (v.at(of_bounds, _I64(i)) for i in range(4))
        gradient = v.mul(y, v.load(v.at(of_margin, _I64(0))))
        gradient = v.add(v.sub(gradient, v.every(1.0)), v.mul(a, diagonal))
        at_zero, at_top = b.fcmp_ordered("<=", a, zero), b.fcmp_ordered(">=", a, top)
        far = b.and_(at_zero, b.fcmp_ordered(">", gradient, v.load(above)))
        far = b.or_(far, b.and_(at_top, b.fcmp_ordered("<", gradient, v.load(below))))
        stays = b.and_(v.mask(on), b.not_(far))
        projected = b.select(at_top, v.larger(gradient, zero), gradient)
        projected = b.select(at_zero, v.smaller(gradient, zero), projected)
        for bound, better in ((high, v.larger), (low, v.smaller)):
            v.store(b.select(stays, better(projected, v.load(bound)), v.load(bound)), bound)
        moves = b.and_(stays, b.fcmp_ordered("!=", projected, zero))
        new = v.sub(a, b.fdiv(gradient, v.add(v.repeat(square), diagonal)))
        new = b.select(moves, v.smaller(v.larger(new, zero), top), a)
        v.store(new, place)
        v.store(v.mul(v.sub(new, a), y), v.at(of_step, _I64(0)))
        moved = b.zext(v.set_of(b.fcmp_ordered("!=", new, a)), _I32)
        return b.or_(b.zext(v.set_of(stays), _I32), b.shl(moved, _I32(16)))

    lanes, number = types.uint16, types.float64
    kinds = (width, lanes, lanes, margin, types.uint64, alpha, cost, number, bounds, types.boolean, step)
    return types.uint32(*kinds), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, begin: Any, end: Any) -> Any:
    """Ask for the memory of ``array``'s numbers ``[begin, end)``, in the order they lie, before it is needed."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = _data(context, b, signature, args, 0)
        line = _I64(_CACHE_LINE * 8 // array.dtype.bitwidth)
        with cgutils.for_range_slice(b, args[1], args[2], line, _I64) as (k, _):
            _ask_for(b, b.gep(data, [k]))
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64), codegen


@intrinsic
def prefetch_rows(typingctx: Any, width: Any, cols: Any, begin: Any, end: Any, weights: Any) -> Any:
    """Ask for the rows of ``weights`` that the columns ``[begin, end)`` will need."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        of_cols, of_weights = (_data(context, b, signature, args, i) for i in (1, 4))
        v = _Vectors(b, width.count, weights)
        with cgutils.for_range_slice(b, args[2], args[3], _I64(1), _I64) as (k, _):
            _ask_for(b, v.at(of_weights, _column(b, of_cols, k)))
        return context.get_dummy_value()

    return types.void(width, cols, types.uint64, types.uint64, weights), codegen


def _ask_for(b: ir.IRBuilder, address: Any) -> None:
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    read, keep, data = _I32(0), _I32(3), _I32(1)
    fn = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(fn, [b.bitcast(address, pointer), read, keep, data])
