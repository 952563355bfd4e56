"""Vectors of sixteen float32 lanes for Numba's loops that LLVM does not vectorise by itself.

Each function is a line or two of LLVM IR on vectors. LLVM splits them if the processor's registers are shorter.
"""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import models, register_model

P = ParamSpec("P")

LANES = 16
FLOAT, INT, HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16)
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
# [256 * 8]: for each byte and each of its bits, how many lower ones are set, or -1 if the bit is not
EXPANSION = np.array(
    [bin(byte & (1 << bit) - 1).count("1") if byte >> bit & 1 else -1 for byte in range(256) for bit in range(8)],
    np.int32,
)
FAST = ("fast",)  # sums in any order, fused multiply-add; all entries are finite


def intrinsic(make: Callable[Concatenate[Any, P], Any]) -> Callable[P, Any]:
    """Numba's `intrinsic`, typed as the call, which lacks the typing context that `make` takes first."""
    return cast(Callable[P, Any], numba_intrinsic(make))


class Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__("lanes")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, FLOATS)


LANES_TYPE = Lanes()


def _constant(kind: ir.Type, values: list):
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def _broadcast(builder, value):
    """A vector's lanes, repeated up to sixteen lanes."""
    places = _constant(INT, [lane % value.type.count for lane in range(LANES)])
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), places)


def _pointer(context, builder, array_type, array, index, kind: ir.Type):
    """Pointer to an element of a one-dimensional C-contiguous array, cast to another type."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


@intrinsic
def zeros(typing_context):
    """Sixteen zeros."""
    return LANES_TYPE(), lambda context, builder, signature, args: ir.Constant(FLOATS, [0.0] * LANES)


@intrinsic
def load(typing_context, array, index):
    """The sixteen float32 from array[index] on."""

    def build(context, builder, signature, args):
        return builder.load(_pointer(context, builder, array, args[0], args[1], FLOATS), align=4)

    return LANES_TYPE(array, types.intp), build


@intrinsic
def load_bfloat16(typing_context, array, index):
    """The sixteen bfloat16, given as uint16, from array[index] on: the upper halves of float32."""

    def build(context, builder, signature, args):
        halves = builder.load(_pointer(context, builder, array, args[0], args[1], ir.VectorType(HALF, LANES)), align=2)
        return builder.bitcast(builder.shl(builder.zext(halves, INTS), _constant(INT, [16] * LANES)), FLOATS)

    return LANES_TYPE(array, types.intp), build


@intrinsic
def expand_bfloat16(typing_context, array, index, bits, places):
    """The bfloat16, given as uint16, from array[index] on, in the lanes whose bit of `bits` (uint16) is set; else 0.

    places: EXPANSION. Sixteen entries from array[index] on must exist, however few are used.
    """

    def build(context, builder, signature, args):
        array, index, bits, places = args
        arrays, halves = signature.args, []
        few = [ir.VectorType(kind, LANES // 2) for kind in (HALF, INT, FLOAT)]
        for half in range(2):
            byte = builder.zext(builder.and_(builder.lshr(bits, HALF(8 * half)), HALF(255)), index.type)
            values = builder.load(_pointer(context, builder, arrays[0], array, index, few[0]), align=2)
            values = builder.bitcast(builder.shl(builder.zext(values, few[1]), _constant(INT, [16] * 8)), few[2])
            start = builder.mul(byte, ir.Constant(byte.type, LANES // 2))
            order = builder.load(_pointer(context, builder, arrays[3], places, start, few[1]), align=4)
            inside = builder.and_(order, _constant(INT, [7] * 8))
            moved = ir.Constant(few[2], ir.Undefined)
            for lane in range(LANES // 2):  # LLVM makes one permutation of it where the processor has one
                entry = builder.extract_element(values, builder.extract_element(inside, INT(lane)))
                moved = builder.insert_element(moved, entry, INT(lane))
            dropped = builder.icmp_signed("<", order, _constant(INT, [0] * 8))
            halves.append(builder.select(dropped, _constant(FLOAT, [0.0] * 8), moved))
            index = builder.add(index, builder.ctpop(byte))
        return builder.shuffle_vector(*halves, _constant(INT, list(range(LANES))))

    return LANES_TYPE(array, types.intp, types.uint16, places), build


@intrinsic
def count_bits(typing_context, bits):
    """Number of the bits of a uint16 that are set."""

    def build(context, builder, signature, args):
        return builder.zext(builder.ctpop(args[0]), ir.IntType(64))

    return types.intp(types.uint16), build


@intrinsic
def load_nibbles(typing_context, array, index):
    """Sixteen codes of 4 bits from array[index] and array[index + 1] (uint32), each at its place in its word.

    Lanes 2i and 2i + 1 are codes i and i + 8, times 16^i. A mask selects them without a shift, and all are exact in
    float32.
    """

    def build(context, builder, signature, args):
        pair = builder.load(_pointer(context, builder, array, args[0], args[1], ir.VectorType(INT, 2)), align=4)
        masks = _constant(INT, [0xF << 4 * (lane // 2) for lane in range(LANES)])
        return builder.uitofp(builder.and_(_broadcast(builder, pair), masks), FLOATS)

    return LANES_TYPE(array, types.intp), build


@intrinsic
def splat(typing_context, number):
    """One float32 in every lane."""

    def build(context, builder, signature, args):
        one = ir.VectorType(FLOAT, 1)
        return _broadcast(builder, builder.insert_element(ir.Constant(one, ir.Undefined), args[0], INT(0)))

    return LANES_TYPE(types.float32), build


@intrinsic
def store(typing_context, array, index, lanes):
    """Write the lanes as sixteen float32 from array[index] on."""

    def build(context, builder, signature, args):
        builder.store(args[2], _pointer(context, builder, array, args[0], args[1], FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, LANES_TYPE), build


@intrinsic
def transpose(typing_context, source, at, step, target, to, stride):
    """Write sixteen rows of sixteen float32 as columns; they begin `step` entries apart, and `stride` in the target."""

    def build(context, builder, signature, args):
        first, at, step, second, to, stride = args
        arrays, rows = signature.args, []
        for row in range(LANES):
            place = builder.add(at, builder.mul(step, ir.Constant(step.type, row)))
            rows.append(builder.load(_pointer(context, builder, arrays[0], first, place, FLOATS), align=4))
        for half in (8, 4, 2, 1):  # swap off-diagonal blocks of decreasing size
            lanes = range(LANES)
            above = _constant(INT, [lane + (LANES - half if lane & half else 0) for lane in lanes])
            below = _constant(INT, [lane + (LANES if lane & half else half) for lane in lanes])
            for row in (row for row in lanes if not row & half):
                a, b = rows[row], rows[row + half]
                rows[row], rows[row + half] = builder.shuffle_vector(a, b, above), builder.shuffle_vector(a, b, below)
        for row, lanes in enumerate(rows):
            place = builder.add(to, builder.mul(stride, ir.Constant(stride.type, row)))
            builder.store(lanes, _pointer(context, builder, arrays[3], second, place, FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), build


@intrinsic
def select(typing_context, bits, lanes, others):
    """Lane i of `lanes` where bit i of `bits` (uint16) is set, of `others` elsewhere."""

    def build(context, builder, signature, args):
        return builder.select(builder.bitcast(args[0], ir.VectorType(ir.IntType(1), LANES)), args[1], args[2])

    return LANES_TYPE(types.uint16, LANES_TYPE, LANES_TYPE), build


@intrinsic
def mul(typing_context, a, b):
    """a * b."""
    return LANES_TYPE(a, b), lambda context, builder, signature, args: builder.fmul(*args, flags=FAST)


@intrinsic
def add(typing_context, a, b):
    """a + b."""
    return LANES_TYPE(a, b), lambda context, builder, signature, args: builder.fadd(*args, flags=FAST)


@intrinsic
def sub(typing_context, a, b):
    """a - b."""
    return LANES_TYPE(a, b), lambda context, builder, signature, args: builder.fsub(*args, flags=FAST)


@intrinsic
def sub_mul(typing_context, a, b, c):
    """a - b * c, product and difference each rounded, as if one were stored before the other."""

    def build(context, builder, signature, args):
        return builder.fsub(args[0], builder.fmul(args[1], args[2]))

    return LANES_TYPE(a, b, c), build


@intrinsic
def div(typing_context, a, b):
    """a / b, rounded to nearest."""
    return LANES_TYPE(a, b), lambda context, builder, signature, args: builder.fdiv(*args)


@intrinsic
def absolute(typing_context, lanes):
    """|lane| of each lane."""

    def build(context, builder, signature, args):
        bits = builder.and_(builder.bitcast(args[0], INTS), _constant(INT, [0x7FFFFFFF] * LANES))
        return builder.bitcast(bits, FLOATS)

    return LANES_TYPE(lanes), build


@intrinsic
def rint(typing_context, lanes):
    """Each lane rounded to a whole number, halves to even."""

    def build(context, builder, signature, args):
        kind = ir.FunctionType(FLOATS, [FLOATS])
        return builder.call(builder.module.declare_intrinsic("llvm.rint.v16f32", fnty=kind), args)

    return LANES_TYPE(lanes), build


@intrinsic
def clamp(typing_context, lanes, limits):
    """The lanes clamped to [0, limit]; no lane is NaN."""

    def build(context, builder, signature, args):
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        lanes = builder.select(builder.fcmp_ordered(">", args[0], zero), args[0], zero)
        return builder.select(builder.fcmp_ordered("<", lanes, args[1]), lanes, args[1])

    return LANES_TYPE(lanes, limits), build


@intrinsic
def reduce_add(typing_context, lanes):
    """Sum of the sixteen lanes, float32."""

    def build(context, builder, signature, args):
        kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
        reduce = builder.module.declare_intrinsic("llvm.vector.reduce.fadd.v16f32", fnty=kind)
        return builder.call(reduce, [FLOAT(0.0), args[0]], fastmath=FAST)

    return types.float32(lanes), build


@intrinsic
def minimum(typing_context, a, b):
    """The lane-wise minimum; no lane is NaN."""

    def build(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return LANES_TYPE(a, b), build


@intrinsic
def reduce_min(typing_context, lanes):
    """The smallest of the sixteen lanes, float32; no lane is NaN, but lanes may be infinite."""

    def build(context, builder, signature, args):
        kind = ir.FunctionType(FLOAT, [FLOATS])
        reduce = builder.module.declare_intrinsic("llvm.vector.reduce.fmin.v16f32", fnty=kind)
        return builder.call(reduce, [args[0]], fastmath=("nnan", "nsz"))

    return types.float32(lanes), build


@intrinsic
def le_mask(typing_context, lanes, limits):
    """Bit i is set if lane i is at most lane i of the limits."""

    def build(context, builder, signature, args):
        return builder.zext(builder.bitcast(builder.fcmp_ordered("<=", *args), HALF), INT)

    return types.uint32(lanes, limits), build


@intrinsic
def lowest_bit(typing_context, bits):
    """Position of the lowest set bit; there must be one."""

    def build(context, builder, signature, args):
        return builder.zext(builder.cttz(args[0], ir.Constant(ir.IntType(1), 1)), ir.IntType(64))

    return types.intp(types.uint32), build


@intrinsic
def from_bfloat16(typing_context, bits):
    """float32 of a bfloat16 given as uint16."""

    def build(context, builder, signature, args):
        return builder.bitcast(builder.shl(builder.zext(args[0], INT), INT(16)), FLOAT)

    return types.float32(types.uint16), build
