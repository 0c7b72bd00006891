// Sample app: classify one image with ONNX Runtime's C++ API.
//
//   classify model.onnx image.ppm labels.txt
//
// The model of the bundle takes uint8 pixels, height x width x channels, and normalises them itself, so a frame from a
// camera goes in as it is. This sample reads a binary PPM or PGM file of exactly the model's size.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

static std::vector<uint8_t> read_image(const char* path, int64_t height, int64_t width, int64_t channels) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t file_width = 0, file_height = 0, largest = 0;
  file >> magic >> file_width >> file_height >> largest;
  file.get();  // the one white space before the pixels
  if (!file || magic != (channels == 3 ? "P6" : "P5") || largest != 255 || file_width != width || file_height != height)
    throw std::runtime_error(std::string(path) + " is no 8-bit " + (channels == 3 ? "PPM" : "PGM") + " of " +
                             std::to_string(width) + " x " + std::to_string(height) + " pixels");
  std::vector<uint8_t> pixels(static_cast<size_t>(height * width * channels));
  if (!file.read(reinterpret_cast<char*>(pixels.data()), static_cast<std::streamsize>(pixels.size())))
    throw std::runtime_error(std::string(path) + " is cut short");
  return pixels;
}

static int classify(const char* model, const char* image, const char* labels_path) {
  Ort::Env environment(ORT_LOGGING_LEVEL_WARNING, "classify");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  Ort::Session session(environment, model, options);

  Ort::AllocatorWithDefaultOptions allocator;
  auto input_name = session.GetInputNameAllocated(0, allocator);
  auto output_name = session.GetOutputNameAllocated(0, allocator);
  std::vector<int64_t> shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  if (shape.size() != 4) throw std::runtime_error("the model takes no image");
  shape[0] = 1;  // the batch dimension may be dynamic

  std::vector<uint8_t> pixels = read_image(image, shape[1], shape[2], shape[3]);
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Ort::Value input =
      Ort::Value::CreateTensor<uint8_t>(memory, pixels.data(), pixels.size(), shape.data(), shape.size());
  const char* input_names[] = {input_name.get()};
  const char* output_names[] = {output_name.get()};
  auto outputs = session.Run(Ort::RunOptions{nullptr}, input_names, &input, 1, output_names, 1);

  const float* logits = outputs[0].GetTensorData<float>();
  const size_t classes = outputs[0].GetTensorTypeAndShapeInfo().GetElementCount();
  const size_t best = static_cast<size_t>(std::max_element(logits, logits + classes) - logits);

  std::ifstream labels(labels_path);
  std::string label;
  for (size_t line = 0; line <= best && std::getline(labels, label); ++line) {
  }
  std::cout << label << " (logit " << logits[best] << ")\n";
  return 0;
}

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: classify model.onnx image.ppm labels.txt\n";
    return 2;
  }
  try {
    return classify(arguments[1], arguments[2], arguments[3]);
  } catch (const std::exception& problem) {
    std::cerr << "classify: " << problem.what() << "\n";
    return 1;
  }
}
