"""FLatten, InLine and the attentions of the paper's tables: any attention in any backbone."""
