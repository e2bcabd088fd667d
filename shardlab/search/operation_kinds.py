"""Operations by what a compiler makes of them: what it computes where it is read, and what it does to a sum's parts."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What XLA computes where it is read.
FUSED = _names("""
    add sub mul div rem neg sign floor ceil round abs max min clamp add_any mul_any nextafter
    exp exp2 log log1p expm1 tanh logistic sin cos tan pow integer_pow sqrt rsqrt cbrt square erf erfc erf_inv
    and or not xor eq ne lt le gt ge select_n is_finite shift_left shift_right_logical shift_right_arithmetic
    convert_element_type bitcast_convert_type reduce_precision real imag conj complex
    broadcast_in_dim iota zeros_like reshape squeeze expand_dims transpose rev
    slice dynamic_slice pad split concatenate
    copy copy_p name stop_gradient sharding_constraint mesh_cast pvary optimization_barrier
    random_wrap random_unwrap random_bits random_fold_in threefry2x32
""")
PRODUCTS = _names("dot_general conv_general_dilated")
# What their rules count as moved, since they touch a part of a table.
COUNTED = _names("gather scatter scatter-add scatter_add")
# What these make of parts of a sum are parts of what they make of the sum.
LINEAR = _names("""
    neg convert_element_type reduce_precision reshape transpose squeeze expand_dims
    copy copy_p name optimization_barrier
""")
# And these, of two sums over the same axes.
JOINED = _names("add add_any sub")
