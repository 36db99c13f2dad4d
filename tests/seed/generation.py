from nnsight import LanguageModel

model = LanguageModel('openai-community/gpt2', device_map='cuda')

with model.generate('The Eiffel Tower is in the city of', max_new_tokens=3) as tracer:
 
  hidden_states1 = model.transformer.h[-1].output[0].save()

  tracer.next()

  hidden_states2 = model.transformer.h[-1].next().output[0].save()

  tracer.next()

  hidden_states3 = model.transformer.h[-1].next().output[0].save()
