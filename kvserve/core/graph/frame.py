"""What the blocks of one graph share: the model, the launch, and how large a row is."""

from dataclasses import dataclass

from kvserve.core.cells import ubatch_tokens, uses_gpu
from kvserve.core.graph.arena import Graph, Tensor
from kvserve.core.plan import Launch
from kvserve.core.shape import AttentionCache, LayerShape, ModelShape, RecurrentState, Widths

F32 = 4
F16 = 2


@dataclass(frozen=True, slots=True)
class Frame:
    """One micro-batch of `n_tokens` of a launch, at a layer.

    `on_host`: the layer's weights and cache lie on the host and come to the GPU for each large
    batch (`op_offload`, ggml_backend_sched_split_graph). `experts_away`: its routed experts do.
    """

    graph: Graph
    shape: ModelShape
    launch: Launch
    n_tokens: int
    on_host: bool = False
    experts_away: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether the graph runs on a GPU."""
        return uses_gpu(self.launch)

    def row(self, width: int, *sources: Tensor) -> Tensor:
        """A tensor of `width` f32 elements for each token."""
        return self.graph.add(self.n_tokens * width * F32, *sources)

    def state(self, n_elements: int, *sources: Tensor) -> Tensor:
        """A tensor of `n_elements` f32 elements for each sequence."""
        return self.graph.add(self.state_bytes(n_elements), *sources)

    def state_bytes(self, n_elements: int) -> int:
        """Bytes of `n_elements` f32 elements for each sequence."""
        return n_elements * self.launch.n_parallel * F32

    def residual(self, *sources: Tensor) -> Tensor:
        """A tensor as wide as the model."""
        return self.row(self.shape.n_embd, *sources)

    def norm(self, x: Tensor) -> Tensor:
        """The residual's norm, and its product with the norm's weights in the same place."""
        normed = self.residual(x)
        weights = self.streamed(self.shape.n_embd * F32)
        return self.graph.add(normed.n_bytes, normed, *weights, in_place=True)

    def streamed(self, n_bytes: int) -> tuple[Tensor, ...]:
        """The copy on the GPU of a host layer's data, for the time of one operation."""
        return (self.graph.add(n_bytes),) if self.on_host and n_bytes else ()

    def matrix(self, layer: LayerShape, name: str) -> tuple[Tensor, ...]:
        """The same for a matrix; routed experts may be on the host without their layer."""
        if not self.on_host and not (self.experts_away and name.endswith("_exps")):
            return ()
        n_bytes = layer.matrix_bytes(name)
        return (self.graph.add(n_bytes),) if n_bytes else ()

    def widths(self, layer: LayerShape) -> Widths:
        """The layer's widths, guessed from the model's own figures where it has none."""
        if layer.widths is not None:
            return layer.widths
        cache, n_ff = layer.attention, self.shape.n_ff
        conv = layer.recurrent.r_elements if layer.recurrent else 0
        return Widths(
            q=0 if cache is None else self.shape.n_head * cache.k_head_size,
            attention=0 if cache is None else self.shape.n_head * cache.v_head_size,
            ff_up=n_ff,
            ff_gate=n_ff,
            ff=n_ff,
            ssm_in=2 * conv,
            ssm_inner=conv,
            conv=conv,
            conv_kernel=1,
        )


def frame_of(shape: ModelShape, launch: Launch) -> Frame:
    """An empty graph for a reserved micro-batch: the same number of tokens for each sequence
    (llama_context::graph_reserve)."""
    n_seqs = launch.n_parallel
    return Frame(Graph(), shape, launch, -(-ubatch_tokens(launch) // n_seqs) * n_seqs)


def attention_of(layer: LayerShape) -> AttentionCache:
    """The cache of a layer that has one. Raises ValueError for another."""
    if layer.attention is None:
        raise ValueError(f"layer {layer.index} has no attention cache")
    return layer.attention


def state_of(layer: LayerShape) -> RecurrentState:
    """The state of a recurrent layer. Raises ValueError for another."""
    if layer.recurrent is None:
        raise ValueError(f"layer {layer.index} has no recurrent state")
    return layer.recurrent
