// One LSTM step for all coordinates, what a C++ extension built at install would hold: blocks that
// stay in the first-level cache, two rows of gates at a time kept in registers, torch's threads.
// Measured by benchmarks/step.py beside the kernel that the package ships.

#include <torch/extension.h>

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kTile = 64;

inline float tanh_(float x) {
  const float z = x * x;
  const float p = (((1.523102888e-08f * z + 2.189512452e-05f) * z + 3.571627196e-03f) * z +
                   1.344452202e-01f) * z + 1.0f;
  const float q = (((8.522703183e-07f * z + 3.411338839e-04f) * z + 2.616455406e-02f) * z +
                   4.677785039e-01f) * z + 1.0f;
  const float value = x * p / q;
  return x > 8.0f ? 1.0f : (x < -8.0f ? -1.0f : value);
}

inline float sigmoid_(float x) { return 0.5f + 0.5f * tanh_(0.5f * x); }

typedef float Vector __attribute__((vector_size(64), aligned(4)));

// out[2][kTile] = bias[2] + weight[2][count] @ rows[count][kBlock]
void tile(const float* weight, const float* bias, const float* rows, float* out, int64_t count) {
  Vector a0 = Vector{} + bias[0], a1 = a0, a2 = a0, a3 = a0;
  Vector b0 = Vector{} + bias[1], b1 = b0, b2 = b0, b3 = b0;
  for (int64_t k = 0; k < count; ++k) {
    const float w = weight[k], v = weight[count + k];
    const Vector* row = reinterpret_cast<const Vector*>(rows + k * kBlock);
    const Vector x0 = row[0], x1 = row[1], x2 = row[2], x3 = row[3];
    a0 += w * x0; a1 += w * x1; a2 += w * x2; a3 += w * x3;
    b0 += v * x0; b1 += v * x1; b2 += v * x2; b3 += v * x3;
  }
  Vector* first = reinterpret_cast<Vector*>(out);
  Vector* second = reinterpret_cast<Vector*>(out + kBlock);
  first[0] = a0; first[1] = a1; first[2] = a2; first[3] = a3;
  second[0] = b0; second[1] = b1; second[2] = b2; second[3] = b3;
}

}  // namespace

// features (F, N); weights (4H, F + H) or (4H, 2H), biases (4H), hidden and cell (H, N), head (H).
torch::Tensor step(torch::Tensor features, std::vector<torch::Tensor> weights,
                   std::vector<torch::Tensor> biases, std::vector<torch::Tensor> hidden,
                   std::vector<torch::Tensor> cell, torch::Tensor head) {
  const int64_t n = features.size(1), inputs = features.size(0), units = head.size(0);
  auto output = torch::empty({n}, features.options());
  const float* x = features.data_ptr<float>();
  const float* head_at = head.data_ptr<float>();
  float* y = output.data_ptr<float>();
  std::vector<float*> h_at, c_at;
  std::vector<const float*> w_at, b_at;
  for (size_t layer = 0; layer < weights.size(); ++layer) {
    h_at.push_back(hidden[layer].data_ptr<float>());
    c_at.push_back(cell[layer].data_ptr<float>());
    w_at.push_back(weights[layer].data_ptr<float>());
    b_at.push_back(biases[layer].data_ptr<float>());
  }
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  at::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    std::vector<float> rows((std::max(inputs, units) + units) * kBlock, 0.0f);
    std::vector<float> gates(4 * units * kBlock);
    for (int64_t block = from; block < to; ++block) {
      const int64_t start = block * kBlock, size = std::min(kBlock, n - start);
      for (int64_t k = 0; k < inputs; ++k)
        std::copy(x + k * n + start, x + k * n + start + size, &rows[k * kBlock]);
      int64_t count = inputs;
      for (size_t layer = 0; layer < w_at.size(); ++layer) {
        for (int64_t j = 0; j < units; ++j)
          std::copy(h_at[layer] + j * n + start, h_at[layer] + j * n + start + size,
                    &rows[(count + j) * kBlock]);
        const int64_t width = count + units;
        for (int64_t b = 0; b < size; b += kTile)
          for (int64_t g = 0; g < 4 * units; g += 2)
            tile(w_at[layer] + g * width, b_at[layer] + g, &rows[b], &gates[g * kBlock + b], width);
        for (int64_t j = 0; j < units; ++j) {
          const float* enter = &gates[j * kBlock];
          const float* forget = &gates[(units + j) * kBlock];
          const float* leave = &gates[(2 * units + j) * kBlock];
          const float* candidate = &gates[(3 * units + j) * kBlock];
          float* __restrict__ c = c_at[layer] + j * n + start;
          float* __restrict__ h = h_at[layer] + j * n + start;
          float* __restrict__ row = &rows[j * kBlock];
#pragma GCC ivdep
          for (int64_t b = 0; b < size; ++b) {
            const float value =
                sigmoid_(forget[b]) * c[b] + sigmoid_(enter[b]) * tanh_(candidate[b]);
            c[b] = value;
            row[b] = h[b] = sigmoid_(leave[b]) * tanh_(value);
          }
        }
        count = units;
      }
      for (int64_t b = 0; b < size; ++b) y[start + b] = 0.0f;
      for (int64_t j = 0; j < units; ++j)
        for (int64_t b = 0; b < size; ++b) y[start + b] += head_at[j] * rows[j * kBlock + b];
    }
  });
  return output;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("step", &step); }
