"""The list of mutants: wrong edits of the Metal text, by kind."""

from __future__ import annotations

from dataclasses import dataclass

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Mutant:
    """One edit.

    Args:
        name: What is wrong.
        kind: barrier, bounds, lanes, block index, scaling, softmax, buffer, rule, merge or router.
        probes: Names of the probes that run the text, without their underscore.
        old: Text to replace.
        new: Replacement.
        nth: Which occurrence of `old`, from 0.
        equivalent: Why no probe can notice the edit; "" if one should.
    """

    name: str
    kind: str
    probes: str
    old: str
    new: str
    nth: int = 0
    equivalent: str = ""

    def concerns(self, probe: str) -> bool:
        """Whether the probe (a function's name) is one of `probes`."""
        return probe[1:] in self.probes.split()

    def apply(self, source: str) -> str:
        """`source` with the edit made."""
        parts = source.split(self.old)
        if len(parts) <= self.nth + 1:
            raise ValueError(f"[Mutant] expected {self.nth + 1} times {self.old!r} in the text, got {len(parts) - 1}.")
        return self.old.join(parts[: self.nth + 1]) + self.new + self.old.join(parts[self.nth + 1 :])


PRE = "attention table routed"
BARRIERS = (
    Mutant(
        "prefill: no barrier before staging",
        "barrier",
        PRE,
        f"    {BARRIER}\n    stage<T, D>(keys.k",
        "    stage<T, D>(keys.k",
    ),
    Mutant(
        "prefill: no barrier after staging", "barrier", PRE, f"    {BARRIER}\n    Matrix scores", "    Matrix scores"
    ),
    Mutant(
        "prefill: value tile staged after the barrier",
        "barrier",
        PRE,
        f"    stage<T, D>(keys.v, first, min(end - first, step), value_tile, seat.thread_index);\n    {BARRIER}\n",
        f"    {BARRIER}\n    stage<T, D>(keys.v, first, min(end - first, step), value_tile, seat.thread_index);\n",
    ),
    Mutant(
        "decode: no barrier before the row is stored",
        "barrier",
        PRE,
        f"    {BARRIER}\n    store_partial",
        "    store_partial",
    ),
    Mutant(
        "decode: no barrier after the row is stored",
        "barrier",
        PRE,
        f"    {BARRIER}\n    const int channel = int(seat",
        "    const int channel = int(seat",
    ),
    Mutant(
        "mass: no barrier before merging", "barrier", "mass", f"  {BARRIER}\n  GroupRow merged", "  GroupRow merged"
    ),
    Mutant("mass: no barrier after merging", "barrier", "mass", f"  {BARRIER}\n  return merged", "  return merged"),
    Mutant(
        "router: no barrier after pooling",
        "barrier",
        "router",
        f"    pooled[channel] = sum / count;\n  }}\n  {BARRIER}\n",
        "    pooled[channel] = sum / count;\n  }\n",
    ),
    Mutant(
        "router: no barrier after a layer",
        "barrier",
        "router",
        f"      outputs[row] = activate ? silu(sum) : sum;\n    }}\n  }}\n  {BARRIER}\n",
        "      outputs[row] = activate ? silu(sum) : sum;\n    }\n  }\n",
    ),
)
BOUNDS = (
    Mutant("prefill: last key of a tile never edge", "bounds", PRE, "last >= end ||", "last > end ||"),
    Mutant("prefill: end of the keys not checked in a mask", "bounds", PRE, "k_pos < range_end && sees", "sees"),
    Mutant("prefill: one row too many staged", "bounds", PRE, "row < count ?", "row <= count ?"),
    Mutant("prefill: one row too few staged", "bounds", PRE, "row < count ?", "row + 1 < count ?"),
    Mutant(
        "prefill: causal edge one key late", "bounds", PRE, "last > view.first_query", "last > view.first_query + 1"
    ),
    Mutant(
        "prefill: last row of a tile lost",
        "bounds",
        PRE,
        "q_pos <= last ? q_pos - offset",
        "q_pos < last ? q_pos - offset",
    ),
    Mutant(
        "prefill: last tile not cut",
        "bounds",
        PRE,
        "min(first + kQueryRows, keys.kv_tokens) - 1",
        "first + kQueryRows - 1",
    ),
    Mutant(
        "prefill: common keys one early",
        "bounds",
        PRE,
        "first >= view.common_begin ||",
        "first + 1 >= view.common_begin ||",
    ),
    Mutant("prefill: sink keys one late", "bounds", PRE, "last < view.row.sink_end", "last <= view.row.sink_end"),
    Mutant("prefill: keys past the range", "bounds", PRE, "end = min(end, keys.kv_tokens);", "end = end + 1;"),
    Mutant("decode: last key of a piece lost", "bounds", PRE, "number < piece.end;", "number + 1 < piece.end;"),
    Mutant("decode: one key too many in a piece", "bounds", PRE, "number < piece.end;", "number <= piece.end;"),
    Mutant("decode: pieces cut short", "bounds", PRE, "(visible + splits - 1) / splits", "visible / splits"),
    Mutant("decode: last row not written", "bounds", PRE, "index <= last}", "index < last}"),
    Mutant(
        "decode: position of a number one off",
        "bounds",
        PRE,
        "number < span.sink_end ? number",
        "number <= span.sink_end ? number",
    ),
    Mutant("mass: block's last group lost", "bounds", "mass", "key_group < end;", "key_group + 1 < end;"),
    Mutant("mass: next block's first group taken", "bounds", "mass", "key_group < end;", "key_group <= end;"),
    Mutant("mass: causal one late", "bounds", "mass", "key_group <= row_group &&", "key_group <= row_group + 1 &&"),
    Mutant("mass: causal one early", "bounds", "mass", "key_group <= row_group &&", "key_group < row_group &&"),
    Mutant("mass: rows before the call counted", "bounds", "mass", "group_row.group >= first_group &&", ""),
    Mutant("mass: rows after the call counted", "bounds", "mass", "&& group_row.group < groups", ""),
    Mutant("mass: rows of the next block counted", "bounds", "mass", "own < groups_per_block &&", ""),
    Mutant("router: last slot lost", "bounds", "router", "slot < last; slot++", "slot + 1 < last; slot++"),
    Mutant(
        "router: overlapping ends counted once", "bounds", "router", "tokens - 2 * ends + slot", "min(slot, tokens - 1)"
    ),
    Mutant(
        "router: pool not cut to the prompt",
        "bounds",
        "router",
        "min(max(pool_tokens, 1), shape[1])",
        "max(pool_tokens, 1)",
    ),
)
LANES = (
    Mutant(
        "layout: row bits swapped",
        "lanes",
        "attention",
        "int((lane / 4) & 4) + int(lane / 2) % 4",
        "int((lane / 4) & 4) + int(lane / 4) % 4",
    ),
    Mutant(
        "layout: column without its high bit",
        "lanes",
        "attention",
        "int((lane / 4) & 2) * 2 + int(lane % 2) * 2",
        "int(lane % 4) * 2",
    ),
    Mutant(
        "layout: row and column swapped",
        "lanes",
        "mass",
        "const int row = matrix_row(lane);\n  const int column = matrix_column(lane);",
        "const int row = matrix_column(lane);\n  const int column = matrix_row(lane);",
    ),
    Mutant(
        "row maximum over the wrong lanes",
        "lanes",
        "attention",
        "value = max(value, simd_shuffle_xor(value, ushort(1)));",
        "value = max(value, simd_shuffle_xor(value, ushort(2)));",
    ),
    Mutant(
        "row maximum over half of the lanes",
        "lanes",
        "attention",
        "return max(value, simd_shuffle_xor(value, ushort(8)));",
        "return value;",
    ),
    Mutant(
        "row sum over the wrong lanes",
        "lanes",
        "attention",
        "return value + simd_shuffle_xor(value, ushort(8));",
        "return value + simd_shuffle_xor(value, ushort(16));",
    ),
    Mutant(
        "prefill: SIMD-groups share rows",
        "lanes",
        "attention",
        "int(simd_index) * 8 + matrix_row(lane), matrix_row",
        "int(simd_index) * 4 + matrix_row(lane), matrix_row",
    ),
    Mutant(
        "prefill: second column read twice",
        "lanes",
        "attention",
        "8 * d + seat.matrix_column + 1));",
        "8 * d + seat.matrix_column));",
    ),
    Mutant(
        "prefill: keys not transposed",
        "lanes",
        "attention",
        "(8 * c + seat.matrix_column) * stride + 8 * d + seat.matrix_row",
        "(8 * c + seat.matrix_row) * stride + 8 * d + seat.matrix_column",
    ),
    Mutant(
        "prefill: values transposed",
        "lanes",
        "attention",
        "(8 * c + seat.matrix_row) * stride + 8 * d + seat.matrix_column",
        "(8 * c + seat.matrix_column) * stride + 8 * d + seat.matrix_row",
    ),
    Mutant(
        "prefill: lse written by the wrong lane",
        "lanes",
        "attention",
        "if (seat.matrix_column == 0) {\n    lse",
        "if (seat.matrix_column == 1) {\n    lse",
    ),
    Mutant(
        "decode: lanes' channels overlap",
        "lanes",
        "attention",
        "const int channel = int(lane) * E + e;\n    values",
        "const int channel = int(lane) + e;\n    values",
    ),
    Mutant(
        "decode: channels stored at the wrong place",
        "lanes",
        "attention",
        "const int channel = int(lane) * E + e;\n    if",
        "const int channel = int(lane) + 32 * e;\n    if",
    ),
    Mutant(
        "mass: rows of the tile mixed",
        "lanes",
        "mass",
        "tile[int(simd_index) * 8 + line] = top;",
        "tile[int(simd_index) * 8 + line / 2] = top;",
    ),
)
INDICES = (
    Mutant(
        "table: diagonal block passed over",
        "block index",
        "table",
        "block <= (end - 1) / block_size",
        "block < (end - 1) / block_size",
    ),
    Mutant(
        "table: next block read", "block index", "table", "view, block * block_size,", "view, (block + 1) * block_size,"
    ),
    Mutant(
        "table: first entry skipped",
        "block index",
        "table",
        "for (int i = 0; i < count; i++) {\n    const int block",
        "for (int i = 1; i < count; i++) {\n    const int block",
    ),
    Mutant(
        "table: one entry too many",
        "block index",
        "table",
        "min(int(row.count[0]), row.columns)",
        "min(int(row.count[0]) + 1, row.columns)",
    ),
    Mutant(
        "table: heads mixed", "block index", "table", "min(head, shape[1] - 1)) * shape[2] + min", "0) * shape[2] + min"
    ),
    Mutant(
        "table: batch rows mixed",
        "block index",
        "table",
        "(min(batch, shape[0] - 1) * shape[1] + min(head, shape[1] - 1)) * shape[2] + min",
        "min(head, shape[1] - 1) * shape[2] + min",
    ),
    Mutant("table: next row", "block index", "table", "counts + line, indices", "counts + line + 1, indices"),
    Mutant(
        "table: rows of a tile from another block",
        "block index",
        "table",
        "tile_index / tiles_per_block;",
        "tile_index / (tiles_per_block + 1);",
    ),
    Mutant(
        "table: a tile crosses its block",
        "block index",
        "table",
        "min(min(first + kQueryRows, block_start + block_size), kv_tokens)",
        "min(first + kQueryRows, kv_tokens)",
    ),
    Mutant(
        "table: full blocks forgotten",
        "block index",
        "table",
        "    attend_listed<T, D>(state, keys, view, full, block_size, rows.end, tile, seat);\n",
        "",
    ),
    Mutant(
        "mass: key block one off",
        "block index",
        "mass",
        "n * groups_per_block, (n + 1) * groups_per_block, lane);\n    }\n    group_row",
        "(n + 1) * groups_per_block, (n + 2) * groups_per_block, lane);\n    }\n    group_row",
    ),
    Mutant("mass: wrong query group", "block index", "mass", "scorer.stride - 1 - t - offset", "t - offset"),
    Mutant(
        "mass: diagonal block left out",
        "block index",
        "mass",
        "n <= block; n += kMassGroups",
        "n < block; n += kMassGroups",
    ),
)
SCALING = (
    Mutant(
        "prefill: unscaled",
        "scaling",
        "attention",
        "thread_elements()[e] * scale : kHidden",
        "thread_elements()[e] : kHidden",
    ),
    Mutant(
        "prefill and decode: natural for binary logarithm", "scaling", "attention", "scale * flux::kLog2e}", "scale}"
    ),
    Mutant(
        "prefill: lse in units of log 2",
        "scaling",
        "attention",
        "(state.top + log2(total)) * kLn2",
        "(state.top + log2(total))",
    ),
    Mutant(
        "decode: lse in units of log 2",
        "scaling",
        "attention",
        "(merged.top + log2(merged.total)) * kLn2",
        "(merged.top + log2(merged.total))",
    ),
    Mutant("decode: queries unscaled", "scaling", "attention", "query[r * E + e] *= keys.scale;", ""),
    Mutant(
        "mass: scaled by the stride only",
        "scaling",
        "mass",
        "(sqrt(float(q_shape[3])) * float(stride))",
        "float(stride)",
    ),
    Mutant("router: sum for mean", "scaling", "router", "sum / count", "sum"),
)
SOFTMAX = (
    Mutant("prefill: output not rescaled", "softmax", "attention", "state.out[d].thread_elements()[1] *= rescale;", ""),
    Mutant("prefill: sum not rescaled", "softmax", "attention", "state.total *= rescale;", ""),
    Mutant(
        "prefill: rescaled the wrong way",
        "softmax",
        "attention",
        "fast::exp2(state.top - top);",
        "fast::exp2(top - state.top);",
    ),
    Mutant("prefill: maximum not kept", "softmax", "attention", "state.top = top;", ""),
    Mutant(
        "prefill: second weight not summed",
        "softmax",
        "attention",
        "state.total += weight;",
        "state.total += e == 0 ? weight : 0.0f;",
    ),
    Mutant(
        "prefill: hidden keys weigh 1 in an empty tile",
        "softmax",
        "attention table",
        "kNoScore = -1.5e38f",
        "kNoScore = -3.0e38f",
        equivalent="at a row's first visible key all that it held is multiplied by exp2(kHidden - score) = 0, and a row "
        "of which a tile is attended sees a key of it",
    ),
    Mutant("prefill: row sum of one lane", "softmax", "attention", "row_sum(state.total)", "state.total"),
    Mutant(
        "decode: output not rescaled", "softmax", "attention", "part.out[e] * rescale + weight", "part.out[e] + weight"
    ),
    Mutant("decode: sum not rescaled", "softmax", "attention", "part.total * rescale + weight", "part.total + weight"),
    Mutant("mass: sum not rescaled", "softmax", "mass", "row.total * fast::exp2(row.top - top) +", "row.total +"),
    Mutant(
        "mass: lanes merged without their maxima",
        "softmax",
        "mass",
        "row_sum(row.total * fast::exp2(row.top - top))",
        "row_sum(row.total)",
    ),
)
BUFFERS = (
    Mutant("prefill: values from the keys", "buffer", PRE, "stage<T, D>(keys.v,", "stage<T, D>(keys.k,"),
    Mutant(
        "prefill: values from the key tile",
        "buffer",
        PRE,
        "add_values<T, D>(state, scores, value_tile, seat)",
        "add_values<T, D>(state, scores, tile, seat)",
    ),
    Mutant(
        "decode: values from the keys",
        "buffer",
        PRE,
        "load_channels<T, D, E>(keys.v,",
        "load_channels<T, D, E>(keys.k,",
    ),
    Mutant(
        "prefill: KV head of query head", "buffer", PRE, "at.y / max(q_shape[1] / k_shape[1], 1)", "at.y % k_shape[1]"
    ),
    Mutant(
        "decode: KV head of another group",
        "buffer",
        PRE,
        "kv_head * heads_per_kv + bounded / q_tokens, bounded % q_tokens",
        "kv_head + bounded / q_tokens, bounded % q_tokens",
    ),
    Mutant("batch ignored", "buffer", PRE, "min(batch, shape[0] - 1) * strides[0] +", ""),
    Mutant(
        "output of another head",
        "buffer",
        PRE,
        "(int64_t(at.z) * q_shape[1] + at.y) * q_shape[2]",
        "(int64_t(at.z) * q_shape[1] + at.y / 2) * q_shape[2]",
    ),
    Mutant("route of the first row for all", "buffer", "routed", "min(at.z, route_shape[0] - 1)", "0"),
    Mutant("decode: route of the first row for all", "buffer", "routed", "min(seat.batch, route_shape[0] - 1)", "0"),
    Mutant("router: bias forgotten", "buffer", "router", "sum += float(bias[row]);", ""),
    Mutant(
        "router: layers' tiles mixed",
        "buffer",
        "router",
        "head_0_bias, 4 * D, 2 * D, true, narrow, wide",
        "head_0_bias, 4 * D, 2 * D, true, wide, wide",
    ),
)
RULES = (
    Mutant(
        "rule: window one block short",
        "rule",
        PRE,
        "q_pos / rule.block_size - rule.window_blocks + 1",
        "q_pos / rule.block_size - rule.window_blocks + 2",
    ),
    Mutant(
        "rule: window one block long",
        "rule",
        PRE,
        "q_pos / rule.block_size - rule.window_blocks + 1",
        "q_pos / rule.block_size - rule.window_blocks",
    ),
    Mutant(
        "rule: sink one block short",
        "rule",
        PRE,
        "min(rule.sink_blocks, kv_tokens",
        "min(max(rule.sink_blocks - 1, 0), kv_tokens",
    ),
    Mutant(
        "rule: sink counted in tokens",
        "rule",
        PRE,
        "kv_tokens / rule.block_size + 1) * rule.block_size",
        "kv_tokens / rule.block_size + 1)",
    ),
    Mutant("rule: the query itself hidden", "rule", PRE, "begin, q_pos + 1}", "begin, q_pos}"),
    Mutant("rule: the next key visible", "rule", PRE, "begin, q_pos + 1}", "begin, q_pos + 2}"),
    Mutant(
        "rule: union of the last query alone",
        "rule",
        PRE,
        "any_dense ? 0 : streaming_begin(rule, first)",
        "any_dense ? 0 : streaming_begin(rule, last)",
    ),
    Mutant("rule: union of the first query alone", "rule", PRE, "last + 1};\n  if", "first + 1};\n  if"),
    Mutant(
        "rule: sink and window counted twice where they touch",
        "rule",
        PRE,
        "span.window_begin <= span.sink_end",
        "false",
    ),
    Mutant("rule: dense queries one late", "rule", PRE, "q_pos >= rule.dense_from &&", "q_pos > rule.dense_from &&"),
    Mutant("rule: dense queries do not end", "rule", PRE, "&& q_pos < rule.dense_to; }", "; }"),
    Mutant("rule: dense queries of a tile forgotten", "rule", PRE, "any_dense ? 0 :", ""),
    Mutant(
        "rule: all dense if any is",
        "rule",
        PRE,
        "first >= rule.dense_from && last < rule.dense_to",
        "first < rule.dense_to && last >= rule.dense_from",
    ),
    Mutant("rule: unset routes are sparse", "rule", "routed", "route != kRouteSparse", "route == 1"),
    Mutant("table: route turned round", "rule", "table", "== flux::kRouteSparse", "!= flux::kRouteSparse"),
)
MERGES = (
    Mutant(
        "decode: a SIMD-group's weight forgotten", "merge", "attention", "merged.out[0] += weight *", "merged.out[0] +="
    ),
    Mutant(
        "decode: last SIMD-group lost",
        "merge",
        "attention",
        "g < kDecodeGroups; g++) {\n    const float weight",
        "g + 1 < kDecodeGroups; g++) {\n    const float weight",
    ),
    Mutant(
        "merge: a split's weight forgotten",
        "merge",
        "attention",
        "sum += fast::exp2(stats[2 * s] - top) * pieces",
        "sum += pieces",
    ),
    Mutant(
        "merge: last split lost",
        "merge",
        "attention",
        "s < splits; s++) {\n    total",
        "s + 1 < splits; s++) {\n    total",
    ),
    Mutant("merge: maximum of one lane", "merge", "attention", "top = simd_max(top);", ""),
    Mutant(
        "decode: split's slot one off",
        "merge",
        "attention",
        "slot * seat.splits + seat.split",
        "slot * seat.splits + 0",
    ),
)
ROUTER = (
    Mutant("router: logits turned round", "router", "router", "outputs[1] > outputs[0] ?", "outputs[0] > outputs[1] ?"),
    Mutant("router: encoder's end activated", "router", "router", "2 * D, 8 * D, false", "2 * D, 8 * D, true"),
    Mutant("router: head not activated", "router", "router", "D, 4 * D, true", "D, 4 * D, false"),
    Mutant("router: sigmoid for SiLU", "router", "router", "return x * (0.5f", "return (0.5f"),
    Mutant("router: heads but one", "router", "router", "head < shape[2];", "head + 1 < shape[2];"),
)

MUTANTS = (
    *BARRIERS,
    *BOUNDS,
    *LANES,
    *INDICES,
    *SCALING,
    *SOFTMAX,
    *BUFFERS,
    *RULES,
    *MERGES,
    *ROUTER,
)
