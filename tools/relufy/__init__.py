"""ReLU-fication: turn a SwiGLU checkpoint into a ReGLU one, whose FFN neurons are mostly zero, by self-distillation."""
