"""Model code of a Flux model directory: the classes are those of the installed package flux-mlx."""

try:
    from flux_mlx.models import Model, ModelArgs
except ModuleNotFoundError as error:
    if error.name != "flux_mlx":
        raise
    raise ImportError("This model routes its layers with the package flux-mlx: pip install flux-mlx") from error

__all__ = ["Model", "ModelArgs"]
