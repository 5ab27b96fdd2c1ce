"""The mutations: a telling choice of cosmic-ray's operators, and one for code that calls where Python would compare."""

from collections.abc import Iterator

from cosmic_ray.operators.operator import Example, Operator
from parso.python.tree import Name, PythonNode

REPLACED = {
    "Binary": "Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul Mod_Mul FloorDiv_Mul BitOr_BitAnd BitAnd_BitOr",
    # Every comparison moves its boundary, and is turned round.
    "Comparison": "Lt_LtE LtE_Lt Gt_GtE GtE_Gt Lt_Gt LtE_GtE Gt_Lt GtE_LtE Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is",
    "Unary": "Delete_USub Delete_Invert Delete_Not",
}
OPERATORS = tuple(
    f"Replace{kind}Operator_{change}" for kind, changes in REPLACED.items() for change in changes.split()
) + (
    "NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "AddNot",
    "RemoveDecorator", "ZeroIterationForLoop",
)  # fmt: skip
"""Names in cosmic-ray's provider `core`. A number becomes one more and one less."""

PAIRS = (("minimum", "maximum"), ("min", "max"), ("floor", "ceil"), ("any", "all"), ("argmin", "argmax"))
SWAPS = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])} | {"round": "floor", "abs": "negative"}


class SwapCall(Operator):
    """Swap `jnp.minimum` and `jnp.maximum`, `floor` and `ceil`, and the like."""

    def mutation_positions(self, node: PythonNode) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        if isinstance(node, Name) and node.value in SWAPS and node.get_previous_leaf() == ".":
            yield node.start_pos, node.end_pos

    def mutate(self, node: PythonNode, index: int) -> PythonNode:
        return Name(SWAPS[node.value], node.start_pos, node.prefix)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("jnp.minimum(a, b)", "jnp.maximum(a, b)"),)
