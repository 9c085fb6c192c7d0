"""The benchmark of activation codecs: bytes a token, error on hidden states, and speed."""
