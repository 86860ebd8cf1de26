"""`qzo tune --dry-run`: what would be run, and how large it is, without loading the weights."""

from qzo.fit import Fit
from qzo.inputs import load_data, quantized_folder
from qzo.memory import gigabytes
from qzo.model.load import load_tokenizer
from qzo.recipe import Recipe, to_yaml
from qzo.run import claim
from qzo.track import check_tracker


def plan(recipe: Recipe, name: str, restart: bool = False) -> None:
    """Print the resolved recipe, the run's folder and state, the data, the work, and the memory by phase.

    Then raises OutOfMemory for a run that does not fit its device, as the run itself would.
    """
    where, header = claim(recipe, name, restart)
    check_tracker(recipe.track)
    folder, config = quantized_folder(recipe)
    train, validation, task = load_data(recipe, load_tokenizer(folder), folder.fit_length(recipe.max_length))
    rows = sum(len(e.rows) for e in train) / len(train)
    tokens = sum(len(row) for e in train for row in e.rows) / len(train)
    forwards = 2 * recipe.directions * recipe.batch_size * recipe.steps * rows
    fit = Fit(recipe, folder, config, train, len(validation), task.generation, header and header["micro_batch"])
    codes, latents = (sum(found.values()) for found in (fit.shapes.host_codes(), fit.shapes.host_latents()))
    forwards_of_step = -(-recipe.batch_size // fit.micro)
    room = f" of {gigabytes(fit.available)} available" if fit.available else ""
    low = getattr(config, "activations", 16)
    inputs = f", activations of {low} bits" if low < 16 else ""
    lines = [
        to_yaml(recipe).rstrip(),
        "",
        f"run folder: {where.path} ({'continues' if header else 'new'})",
        f"model: {getattr(config, 'width', config.bits)} bits, group {config.group_size}, {config.version}{inputs}; on {fit.device.type} in {str(fit.dtype)[6:]}",
        f"data: {len(train)} training examples ({rows:.3g} rows and {tokens:.0f} tokens each), {len(validation)} for evaluation",
        f"work: {recipe.steps} steps, {forwards:.0f} example-forwards, {fit.micro} examples at a time",
        f"memory: about {gigabytes(fit.estimate().peak)}{room}, beside {'the CUDA context' if fit.device.type == 'cuda' else 'Python and its libraries'}",
        fit.table(),
        *([f"codes in host memory: {gigabytes(codes)}; {gigabytes(codes * forwards_of_step)} cross the bus in a step"] if codes else []),
        *([f"latents in host memory: {gigabytes(latents)}; {gigabytes(latents * (forwards_of_step + 1))} cross the bus in a step, "
           f"{gigabytes(latents)} of them back"] if latents else []),
        f"what would lower it most: {fit.advice() or 'nothing by more than a hundredth'}",
    ]  # fmt: skip
    print("\n".join(lines))
    fit.check()
