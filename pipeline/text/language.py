def identify(text: str) -> tuple[str, float]:
    raise NotImplementedError
