"Tiny vision-language models with random weights, of the classes that transformers names for LLaMA-3.2-Vision and LLaVA-NeXT-Video."
WORDS = 'user assistant : . , ? this a meme video says is it answer with or one of the words definition label non not hateful nothing red blue'.split()
CHAT = ("{% for m in messages %}{{ m.role }} : {% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% else %}<{{ c.type }}>{% endif %} "
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}")
TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def tiny_tokenizer(image):
    "A tokenizer of a few words."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = ['<pad>', '<s>', '</s>', '<unk>', image, '<video>']
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *dict.fromkeys(WORDS)])}, unk_token='<unk>'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token='<s>', eos_token='</s>', pad_token='<pad>', unk_token='<unk>',
        extra_special_tokens=dict(image_token=image, video_token='<video>'))


def tiny_llama():
    "LLaMA-3.2-Vision's class: pictures by cross-attention."
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessor, MllamaProcessor
    vision = dict(hidden_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=4, intermediate_size=64, image_size=28,
                  patch_size=14, max_num_tiles=1, intermediate_layers_indices=[0], vision_output_dim=64, supported_aspect_ratios=[[1, 1]])
    text = dict(TEXT, num_hidden_layers=3, cross_attention_layers=[1], rope_parameters=dict(rope_type='default', rope_theta=1e4), **TOKENS)
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=4))
    pictures = MllamaImageProcessor(size=dict(height=28, width=28), max_image_tiles=1)
    return model, MllamaProcessor(pictures, tiny_tokenizer('<image>'), chat_template=CHAT)


def tiny_llava():
    "LLaVA-NeXT-Video's class: pictures and frames as tokens."
    from transformers import (
        LlavaNextImageProcessor, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor)
    vision = dict(model_type='clip_vision_model', hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  image_size=28, patch_size=7, projection_dim=32)
    text = dict(model_type='llama', num_hidden_layers=2, **TEXT, **TOKENS)
    config = LlavaNextVideoConfig(vision_config=vision, text_config=text, image_grid_pinpoints=[[28, 28]], image_token_index=4, video_token_index=5)
    size = dict(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28))
    processor = LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(**size), LlavaNextImageProcessor(**size, image_grid_pinpoints=[[28, 28]]), tiny_tokenizer('<image>'),
        chat_template=CHAT, patch_size=7, vision_feature_select_strategy='default', num_additional_image_tokens=1)
    return LlavaNextVideoForConditionalGeneration(config), processor
