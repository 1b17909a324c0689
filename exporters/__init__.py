"""Part of marrq: from an artifact to a graph. A model is traced once with placeholders for its
quantized linears (`trace`), and a flavour lowers those placeholders (`integer`, one file a
flavour); `floating` exports the float baselines."""
