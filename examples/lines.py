"""The kernel layouts of the examples, one line each.

Marlin: tile and fragment order as in vLLM ``quantization/utils/marlin_utils_test.py`` (``get_weight_perm``,
``marlin_permute_weights``), ``marlin_permute_scales``, ``awq_to_marlin_zero_points``. AWQ packs 8 columns in the order
0 2 4 6 1 3 5 7 (digits ``ch cl`` of column ``2*cl + ch``), GPTQ packs 8 rows in order. MXFP4: SGLang ``mxfp4.py``, FlashInfer
``shuffle_matrix_a`` and ``nvfp4_block_scale_interleave``. DeepGEMM: ``get_mn_major_tma_aligned_packed_ue8m0_tensor``.
"""

from __future__ import annotations

from aliasparam.layout import Layout

#: int32 ``[K, N/8]`` to int32 ``[K/16, 2N]``. K % 16 == 0, N % 64 == 0.
AWQ_WEIGHT = Layout("(kt e1 l4 e0) (n b h ch cl) -> kt (n cl ch l4 b e0 h e1)", e1=2, l4=4, e0=2, b=4, h=2, ch=2, cl=4, bits=4)
#: int32 ``[K/8, N]`` to int32 ``[K/16, 2N]``.
GPTQ_WEIGHT = Layout("(kt e1) (n b h l8 l4 e0) -> kt (n l8 l4 b e0 h e1)", e1=2, b=4, h=2, l8=8, l4=4, e0=2, bits=4)
#: Group scales ``[K/G, N]``, any element.
MARLIN_SCALES = Layout("g (n b a) -> g n a b", b=8, a=8)
#: Packed zero points int32 ``[K/G, N/8]``, in AWQ's order before and after.
AWQ_ZEROS = Layout("g (n bl bh ch cl) -> g n cl ch bh bl", bl=4, bh=2, ch=2, cl=4, bits=4)

#: gpt-oss: pairs of rows (gate, up) exchanged, then shuffled; and their UE8M0 scales, in 128x4 tiles too.
MXFP4_W13 = Layout("(g b a p) k -> g a ~p b k", b=8, a=2, p=2)
MXFP4_W13_SCALE = Layout("(rt r4 b a p) (ct c4) -> rt ct a ~p b r4 c4", r4=4, b=8, a=2, p=2, c4=4)
MXFP4_W2 = Layout("(g b a) k -> g a b k", b=8, a=4)
MXFP4_W2_SCALE = Layout("(rt r4 b a) (ct c4) -> rt ct a b r4 c4", r4=4, b=8, a=4, c4=4)

#: UE8M0 bytes ``[MN, K]`` to ``[ceil(K/4), align(MN, 4), 4]``.
PACKED_UE8M0 = Layout("(m a) (k c) -> k (m a) c", a=4, c=4)

#: bf16 ``[E, 2I, H]``, rows ``[gate; up]``, to rows ``[up; gate]``.
W13_UP_GATE = Layout("(h i) k -> ~h i k", h=2)
