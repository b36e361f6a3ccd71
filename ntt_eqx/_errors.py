"""Errors that several rooms raise."""


class DivergenceError(ArithmeticError):
    """A loss became NaN or infinite.

    Attributes:
        phase: what was running.
        step: the step after which it was seen.
        value: the loss.
    """

    def __init__(self, phase: str, step: int, value: float):
        """Say where it happened and what to try."""
        super().__init__(
            f"{phase}: the loss became {value} at step {step}. Try a smaller learning rate or "
            "gradient clipping (optax.clip_by_global_norm), and check that the inputs are "
            "standardised."
        )
        self.phase = phase
        self.step = step
        self.value = value
