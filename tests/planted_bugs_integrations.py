"""Bugs of the compiler backend, for tests/planted_bugs.py."""

GRAPH = "sra_fast/integrations/graph.py"
FACTS = "sra_fast/integrations/facts.py"
NORMS = "sra_fast/integrations/norms.py"
TOKENS = "sra_fast/integrations/tokens.py"
REFUSALS = "sra_fast/integrations/refusals.py"
PATTERNS = "sra_fast/integrations/patterns.py"
REWRITING = "sra_fast/integrations/rewriting.py"
REPORT = "sra_fast/integrations/report.py"
BACKEND = "sra_fast/integrations/backend.py"
TABLES = "sra_fast/integrations/tables.py"
PATCHES = "sra_fast/integrations/patches.py"

T_PATTERNS = "tests/integrations/test_patterns.py"
T_TABLES = "tests/integrations/test_table_sums.py"
T_BACKEND = "tests/integrations/test_backend.py"
T_PATCHES = "tests/integrations/test_patches.py"

BUGS = [
    (
        "backend: tensors that change are read late",
        REFUSALS,
        "if any(facts.is_changed(node) for node in [*inside, *read]):",
        "if False:",
        T_PATTERNS,
    ),
    (
        "backend: a view is another tensor",
        GRAPH,
        "return tensor.untyped_storage()._cdata",
        "return id(tensor)",
        T_PATTERNS,
    ),
    (
        "backend: out= changes nothing",
        FACTS,
        'return _nodes(node.kwargs["out"])',
        "return []",
        T_PATTERNS,
    ),
    (
        "backend: inplace=True changes nothing",
        FACTS,
        "or _asks_for_in_place(node):",
        "or False:",
        T_PATTERNS,
    ),
    (
        "backend: what is passed over may change",
        REFUSALS,
        "inside = [*found.inside, *_passed_over(found, read)]",
        "inside = [*found.inside]",
        T_PATTERNS,
    ),
    (
        "backend: a change under no_grad is a sum",
        FACTS,
        "if not facts.one_grad_mode([x, node]):",
        "if False:",
        T_PATTERNS,
    ),
    (
        "backend: other uses of what is inside do not count",
        REWRITING,
        "if not shared:",
        "if True:",
        T_PATTERNS,
    ),
    (
        "backend: vectors of tokens are vectors of frames",
        TOKENS,
        "return fits and same(tokens, 1) and same(width, x.shape[2])",
        "return fits and same(width, x.shape[2])",
        T_PATTERNS,
    ),
    (
        "backend: an input changed in place is a sum",
        FACTS,
        "if not fresh or read_later",
        "if read_later",
        T_PATTERNS,
    ),
    (
        "backend: a changed tensor is read as it was",
        FACTS,
        "if not fresh or read_later",
        "if not fresh",
        T_PATTERNS,
    ),
    (
        "backend: every eps is 1e-6",
        NORMS,
        "return Norm(node, uncast(x), kind, eps, weight, bias, [node])",
        "return Norm(node, uncast(x), kind, 1e-6, weight, bias, [node])",
        T_PATTERNS,
    ),
    (
        "backend: the norm's weight is forgotten",
        REWRITING,
        '"norm_weight": self._now(norm.weight)}',
        '"norm_weight": None}',
        T_PATTERNS,
    ),
    (
        "backend: 2 + scale is 1 + scale",
        TOKENS,
        "if isinstance(a, int | float) and a == 1 and scale is not None:",
        "if isinstance(a, int | float) and scale is not None:",
        T_PATTERNS,
    ),
    (
        "backend: a norm over several dimensions",
        NORMS,
        "return x is not None and len(sizes) == 1 and same(sizes[0], x.shape[-1])",
        "return x is not None and same(sizes[-1], x.shape[-1])",
        T_PATTERNS,
    ),
    (
        "backend: a mean square over any dimension",
        NORMS,
        "if sizes[0] not in (-1, source.dim() - 1):",
        "if False:",
        T_PATTERNS,
    ),
    (
        "backend: the mean square of another tensor",
        NORMS,
        "if base is None or uncast(base) is not uncast(x):",
        "if base is None:",
        T_PATTERNS,
    ),
    (
        "backend: a norm under no_grad is fused with what has gradients",
        FACTS,
        "grad_region += not _is_autocast(node)",
        "grad_region += 0",
        T_PATTERNS,
    ),
    (
        "backend: modulation is moved into another autocast",
        REWRITING,
        "if not self.facts.one_mode([node for node in between if node in self.facts.position]):",
        "if False:",
        T_PATTERNS,
    ),
    (
        "backend: random numbers are moved",
        REWRITING,
        "if not all(self._is_movable(node) for node in late):",
        "if not all(self._is_movable(node) or 'dropout' in node.name for node in late):",
        T_PATTERNS,
    ),
    (
        "backend: strides do not matter",
        REFUSALS,
        "if _depends_on_strides(found.root):",
        "if False:",
        T_PATTERNS,
    ),
    (
        "backend: results are rounded early",
        REWRITING,
        'arguments["dtype"] = dtype',
        'arguments["dtype"] = torch.bfloat16',
        T_PATTERNS,
    ),
    (
        "backend: a gate that is promoted is rounded",
        REWRITING,
        'x = insert(self.graph, "to", x, dtype, like=found.root)',
        "pass",
        T_PATTERNS,
    ),
    (
        "backend: bodies of checkpoints are not entered",
        GRAPH,
        "if wraps and node.target.name() in _WRAPPERS:",
        "if False:",
        T_BACKEND,
    ),
    (
        "backend: modulation is not moved above a tap",
        REWRITING,
        "            anchor = total\n",
        "            return None\n",
        T_PATTERNS,
    ),
    (
        "backend: undo leaves the compiled call",
        BACKEND,
        "module._compiled_call_impl = None",
        "pass",
        T_PATTERNS,
    ),
    (
        "report: of every model",
        REPORT,
        "mine = [record for record in _records if record.reads(model)]",
        "mine = list(_records)",
        T_BACKEND,
    ),
    (
        "patch: any forward is known",
        PATCHES,
        "if digits not in KNOWN:",
        "if digits not in KNOWN and (digits := next(iter(KNOWN))) is None:",
        T_PATCHES,
    ),
    (
        "backend: inductor gets operators with a vector per token",
        BACKEND,
        'options.pop("vectors_per_token", then != "inductor")',
        'options.pop("vectors_per_token", True)',
        T_BACKEND,
    ),
    (
        "backend: the second modulation is the first",
        REWRITING,
        "vectors = self._norm_arguments(second, residual.x)",
        "vectors = self._norm_arguments(norm, residual.x)",
        T_PATTERNS,
    ),
    (
        "backend: a second modulation of any kind goes along",
        REWRITING,
        'if any(vector_kind(vector, x) != "image" for vector in vectors):',
        "if False:",
        T_PATTERNS,
    ),
    (
        "backend: a second modulation of another dtype goes along",
        REWRITING,
        "same_dtype = value(second.root).dtype == value(first.root).dtype",
        "same_dtype = True",
        T_PATTERNS,
    ),
    (
        "tables: never taken apart",
        REWRITING,
        "found = find_sum(node, [root], self.facts)",
        "found = None",
        T_TABLES,
    ),
    (
        "tables: any sum",
        TABLES,
        "is_one_row = same(sizes[-1], whole.shape[-1]) and all(same(n, 1) for n in sizes[:-1])",
        "is_one_row = True",
        T_TABLES,
    ),
    (
        "tables: an embedding that changes is read late",
        TABLES,
        "node not in facts.position or facts.is_changed(node)",
        "node not in facts.position",
        T_TABLES,
    ),
    (
        "tables: gradients that the sum had not",
        TABLES,
        "return facts.one_grad_mode([*passed, *used_by])",
        "return True",
        T_TABLES,
    ),
    (
        "tables: a sum in fp64",
        TABLES,
        "if whole.dtype != torch.float64 and torch.float64 in (vectors.dtype, table.dtype):",
        "if False:",
        T_TABLES,
    ),
    (
        "tables: a cut for every vector",
        REWRITING,
        "known = self.cut_alike.get((step, operand))",
        "known = None",
        f"{T_TABLES}::test_one_cut_for_all_vectors",
    ),
    (
        "tables: a cut stays where it was",
        REWRITING,
        "            step.prepend(known)\n",
        "            pass\n",
        f"{T_TABLES}::test_cuts_that_move_twice",
    ),
    (
        "tables: sums stay in the graph",
        REWRITING,
        "self.taken_apart.update([found.total, *found.steps])",
        "pass",
        T_TABLES,
    ),
    (
        "tables: one embedding is not expanded",
        TABLES,
        "return None if set(sizes) == {-1} else sizes",
        "return None",
        T_TABLES,
    ),
]
