"""Mistakes for `tests.mutation.kernels` in the kernels of attention and tokens.

(name, file of csrc/, text that occurs there exactly once, what it becomes). The name begins with the
family whose tests must notice.
"""

from __future__ import annotations

__all__ = ["MISTAKES"]

KD, MAPS, CORE = "attention_kd.cuh", "attention_maps.cuh", "tensor_core.cuh"
HEAD, PACK = "head_mask.cuh", "pack_tokens.cuh"

MISTAKES = [
    (
        "attention_kd: tiles are replaced while others read",
        MAPS,
        "    __syncthreads();  // all have done with the last tile\n",
        "",
    ),
    (
        "attention_kd: tiles are read before they are there",
        MAPS,
        "    prepare(first);\n    __syncthreads();",
        "    prepare(first);",
    ),
    (
        "attention_kd: the normalisers' tiles are read before they are there",
        KD,
        "    __syncthreads();\n    for (int panel = 0; panel < ROWS; panel += PANEL) {\n      float scores",
        "    for (int panel = 0; panel < ROWS; panel += PANEL) {\n      float scores",
    ),
    (
        "attention_kd: no barrier before the block's loss",
        KD,
        "losses[warp] = loss;\n  __syncthreads();",
        "losses[warp] = loss;",
    ),
    (
        "attention_kd: no barrier before the total",
        KD,
        "sums[threadIdx.x / WARP] = sum;\n  __syncthreads();",
        "sums[threadIdx.x / WARP] = sum;",
    ),
    (
        "attention_kd: one key too many",
        MAPS,
        "if (key >= problem.keys) return 0;",
        "if (key > problem.keys) return 0;",
    ),
    (
        "attention_kd: queries behind the last count",
        MAPS,
        "  if (query >= problem.queries) return 0;\n",
        "",
    ),
    ("attention_kd: causal without oneself", MAPS, "if (key <= query)", "if (key < query)"),
    ("attention_kd: one row too many is read", MAPS, "if (row < left &&", "if (row <= left &&"),
    ("attention_kd: one column too many is read", MAPS, "column < depth)", "column <= depth)"),
    ("attention_kd: one mask for both", MAPS, "(seen) << s", "(seen) << 0"),
    (
        "attention_kd: the last 16th of a head is left out",
        MAPS,
        "(side.depth + 15) / 16 * 16",
        "side.depth / 16 * 16",
    ),
    (
        "attention_kd: strides of a weight swapped",
        MAPS,
        "at.batch * problem.weight_batch_stride + at.head * problem.weight_head_stride",
        "at.batch * problem.weight_head_stride + at.head * problem.weight_batch_stride",
    ),
    (
        "attention_kd: sums are not moved to a new maximum",
        KD,
        "        sum[i] *= exp2_approx(before[i] - base);\n",
        "",
    ),
    (
        "attention_kd: a maximum of nothing is subtracted",
        KD,
        "top[i] == -INFINITY ? 0.0f : top[i]",
        "top[i]",
    ),
    (
        "attention_kd: two of four lanes are added",
        KD,
        "return value + __shfl_xor_sync(FULL, value, 2);",
        "return value;",
    ),
    ("attention_kd: the softmax's slope forgets D", KD, "((p - q) - row.dot)", "(p - q)"),
    (
        "attention_kd: a teacher that sees nothing still pulls",
        KD,
        "(p * row.dot - q)",
        "(p - q)",
    ),
    (
        "attention_kd: fp16 loses small gradients",
        KD,
        "KIND == SCORES ? 1.0f : 16384.0f",
        "1.0f",
    ),
    ("attention_kd: gradients stay enlarged", KD, "  factor /= KD_ENLARGED<KIND>;\n", ""),
    (
        "attention_kd: gradients forget the weight",
        KD,
        "load<1>(upstream).value[0] * kd_weight(problem, at) *",
        "load<1>(upstream).value[0] *",
    ),
    (
        "attention_kd: gradients forget what comes from above",
        KD,
        "float factor = load<1>(upstream).value[0] *",
        "float factor =",
    ),
    (
        "attention_kd: one column too many is written",
        KD,
        "column >= problem.side[0].depth)",
        "column > problem.side[0].depth)",
    ),
    (
        "attention_kd: dk sees flags of the wrong key",
        KD,
        "seen_by(problem, flags[e / 2], first + column, key + e / 2 * 8)",
        "seen_by(problem, flags[0], first + column, key)",
    ),
    (
        "attention_kd: the kind of 16 bits mixed up",
        CORE,
        "  if (is_half) {\n    multiply_as<true>",
        "  if (!is_half) {\n    multiply_as<true>",
    ),
    (
        "attention_kd: fragments of b as those of a",
        CORE,
        "b += (lane / 16 * 8 + lane % 8) * TILE_STRIDE<Bits> + lane / 8 % 2 * 8;",
        "b += (lane % 16) * TILE_STRIDE<Bits> + lane / 16 * 8;",
    ),
    (
        "attention_kd: halves of a left operand swapped",
        CORE,
        "{pack<HALF>(p[k][0], p[k][1]), pack<HALF>(p[k][2], p[k][3]),",
        "{pack<HALF>(p[k][2], p[k][3]), pack<HALF>(p[k][0], p[k][1]),",
    ),
    (
        "attention_kd: keys are not transposed",
        CORE,
        "load_matrices<true>(right",
        "load_matrices<false>(right",
    ),
    (
        "attention_kd: alignment not asked for",
        "attention_kd.cu",
        "vectors = vectors && rows_aligned(data, stride, element_bytes(type), width);",
        "(void)stride;",
    ),
    (
        "attention_kd: float tiles for 16-bit teachers forgotten",
        "attention_kd.cu",
        "!is_short(problem.side[0].type) || !is_short(problem.side[1].type)",
        "!is_short(problem.side[0].type)",
    ),
    (
        "head_mask: no barrier before the block's sum",
        HEAD,
        "sums[threadIdx.x / WARP] = sum;\n  __syncthreads();",
        "sums[threadIdx.x / WARP] = sum;",
    ),
    (
        "head_mask: one token too many in a share",
        HEAD,
        "end = least(begin + HEAD_TOKENS, shape.tokens);",
        "end = least(begin + HEAD_TOKENS + 1, shape.tokens);",
    ),
    (
        "head_mask: the last token left out",
        HEAD,
        "shape.tokens);\n    int64_t vectors",
        "shape.tokens - 1);\n    int64_t vectors",
    ),
    (
        "head_mask: idle threads take part",
        HEAD,
        "inside = threadIdx.x / vectors < step;",
        "inside = true;",
    ),
    (
        "head_mask: rows are not added up",
        HEAD,
        "i < rows * shape.chunks;",
        "i < shape.chunks;",
    ),
    (
        "head_mask: heads take their neighbour's shares",
        HEAD,
        "entry + i / shape.chunks * shape.heads;",
        "entry + i / shape.chunks;",
    ),
    (
        "head_mask: alignment of the context not asked for",
        "head_mask.cu",
        "return aligned(context, in, sizeof(T), width) && aligned(y, out, sizeof(T), width);",
        "return aligned(y, out, sizeof(T), width);",
    ),
    (
        "pack_tokens: no barrier before counts are added",
        PACK,
        "sums[threadIdx.x / WARP] = sum;\n  __syncthreads();",
        "sums[threadIdx.x / WARP] = sum;",
    ),
    (
        "pack_tokens: no barrier before ranks are read",
        PACK,
        "    }\n  }\n  __syncthreads();\n}",
        "    }\n  }\n}",
    ),
    (
        "pack_tokens: a token counts itself",
        PACK,
        "((1u << lane) - 1)",
        "((2u << lane) - 1)",
    ),
    (
        "pack_tokens: the second 32 tokens forget the first",
        PACK,
        "      before += __popc(votes);\n",
        "",
    ),
    (
        "pack_tokens: bytes behind the last 16 are not counted",
        PACK,
        "for (int64_t i = 16 * wide + threadIdx.x; i < count;",
        "for (int64_t i = 16 * wide + threadIdx.x; i < 16 * wide;",
    ),
    (
        "pack_tokens: alignment of keep not asked for",
        PACK,
        "bool aligned = reinterpret_cast<uintptr_t>(keep) % 16 == 0;",
        "bool aligned = true;",
    ),
    (
        "pack_tokens: the last kept token is not in the sum",
        PACK,
        "static_cast<int32_t>(rank + kept)",
        "static_cast<int32_t>(rank)",
    ),
    (
        "pack_tokens: dropped tokens are all put in one place",
        PACK,
        "all - 1 - (token - rank)",
        "all - 1",
    ),
    (
        "pack_tokens: rows behind the packed ones are read",
        PACK,
        "bool there = place < shape.packed_rows;",
        "bool there = true;",
    ),
    (
        "pack_tokens: alignment of tokens not asked for",
        "pack_tokens.cu",
        "wide = wide && rows_aligned(padded, stride * bytes, 1, 16);",
        "(void)stride;",
    ),
]
