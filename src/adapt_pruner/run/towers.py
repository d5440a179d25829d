"""Whether a run can prune and train a model of two towers: what goes through one stack of layers, or predicts tokens, is refused."""

from adapt_pruner.core.system import world
from adapt_pruner.errors import UsageError
from adapt_pruner.reduce.units import evidence_of
from adapt_pruner.score.calibrate import Evidence
from adapt_pruner.work import Work


def check_towers(work: Work) -> None:
    """Refuse for a model of several towers what goes through one stack of layers, or predicts tokens; and what is for pairs, for others.

    Raises:
        UsageError: the recipe asks for such a thing.
    """
    recipe, training = work.recipe, work.recipe.training
    of_pairs = training.source is not None and training.objective.startswith("pairs.")
    if len(work.task.towers) == 1:
        if of_pairs:
            raise UsageError(
                f"training.objective {training.objective!r} is for models of two towers; set it to objectives.distil"
            )
        return
    passes = (Evidence.STREAM_GRADIENTS, Evidence.SAMPLE_GRADIENTS)
    unfit = {
        f"reduce={recipe.reduce}": recipe.reduce.partition("(")[0] not in ("units", "towers", "masks"),
        f"metric={recipe.metric}": recipe.metric is not None and not recipe.metric.startswith(("weights.", "removal.")),
        f"distance={recipe.distance}": recipe.distance is not None and not recipe.distance.startswith("blocks.loss_drop"),
        f"repair={recipe.repair}": recipe.repair is not None,
        "sequential_scoring": recipe.sequential_scoring,
        "vocabulary": recipe.vocabulary is not None,
        "latency": bool(recipe.latency),
        f"offload={recipe.offload}": recipe.offload not in ("auto", "none"),
        "parallel=fsdp": recipe.parallel == "fsdp" and world.size() > 1,
        "evaluation.tasks": recipe.evaluation.tasks is not None,
        f"training.objective={training.objective}": training.source is not None
        and not of_pairs
        and training.objective != "objectives.lm",
        "training.lora": training.lora is not None,
        "training.liger": training.liger,
        f"training.weights={training.weights}": training.weights != "float32",
    }
    wrong = [key for key, given in unfit.items() if given]
    if not wrong and work.reads_text and "units" in recipe.reduce and evidence_of(work) in passes:
        wrong = [f"metric={recipe.metric}"]
    if wrong:
        kind = work.model.config.model_type
        raise UsageError(
            f"{' and '.join(wrong)} does not work with a model of two towers ({kind}), only with one stack of layers; leave that out, or set "
            "method to mope-clip, llm-pruner, uniform, magnitude or random"
        )
