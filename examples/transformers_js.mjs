import { env, pipeline } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = "models";

for (const dtype of ["q4", "q8"]) {
  const generate = await pipeline("text-generation", "decoder", { dtype });
  const [answer] = await generate("def ", { max_new_tokens: 8 });
  console.log(dtype, JSON.stringify(answer.generated_text));
}
