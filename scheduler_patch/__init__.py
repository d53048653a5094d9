"""Every change of SGLang's scheduler and cache, one hook per behaviour."""
