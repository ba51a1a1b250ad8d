"""LayerScale (arXiv 2103.17239): a learned vector scales what attention and FFN add to the residual."""

from dataclasses import replace

from models.plugins import Plugin


class LayerScale(Plugin):
    class Options(Plugin.Options):
        initial: float = 0.1

    def refusals(self, model, options, layout):
        return ["not with sequence parallelism"] if layout.sequence_parallel else []

    def parameters(self, model, options):
        return 2 * model.hidden_size

    def layer_spec(self, spec, model, options):
        from megatron.core.transformer import ModuleSpec

        from layer_scale.scaled_add import ScaledAdd

        add = ModuleSpec(ScaledAdd, {"size": model.hidden_size, "initial": options.initial})
        return replace(spec, submodules=replace(spec.submodules, self_attn_bda=add, mlp_bda=add))
