// Runs a sound file through the network that examples/amplifier.py exported, in blocks as a sound card
// would ask for them:  amplifier IN.wav OUT.wav  (one channel, 16 bits). Prints microseconds per sample.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "network.h"

namespace {

using Bytes = std::vector<unsigned char>;

[[noreturn]] void Fail(const char* what, const char* path) {
  std::fprintf(stderr, "%s: %s\n", path, what);
  std::exit(1);
}

Bytes Read(const char* path) {
  std::FILE* file = std::fopen(path, "rb");
  if (!file) Fail("cannot be read", path);
  Bytes bytes;
  unsigned char part[4096];
  while (const size_t n = std::fread(part, 1, sizeof(part), file))
    bytes.insert(bytes.end(), part, part + n);
  std::fclose(file);
  return bytes;
}

// Where the samples of a file lie in it: RIFF is a list of chunks, of a name, a size and so many bytes.
struct Samples {
  size_t begin, count;
};
Samples Find(const Bytes& wav, const char* path) {
  const auto number = [&](size_t at, size_t n) {
    uint32_t value = 0;
    std::memcpy(&value, wav.data() + at, n);
    return value;
  };
  bool known = false;
  for (size_t at = 12; at + 8 <= wav.size();) {
    const size_t begin = at + 8, size = number(at + 4, 4), room = wav.size() - begin;
    if (!std::memcmp(wav.data() + at, "fmt ", 4) && size >= 16 && room >= 16)
      known = number(begin, 2) == 1 && number(begin + 2, 2) == 1 && number(begin + 14, 2) == 16;
    if (!std::memcmp(wav.data() + at, "data", 4) && known) return {begin, std::min(size, room) / 2};
    at = begin + std::min(size + size % 2, room);
  }
  Fail("expected a WAV file of one channel and 16 bits", path);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) Fail("IN.wav OUT.wav", argv[0]);
  Bytes wav = Read(argv[1]);
  const Samples samples = Find(wav, argv[1]);
  network_state* network = network_create();
  if (!network) Fail("no memory", argv[0]);

  constexpr size_t kBlock = 64;
  float block[kBlock];
  std::chrono::duration<double> spent{0};
  for (size_t first = 0; first < samples.count; first += kBlock) {
    const size_t n = std::min(kBlock, samples.count - first);
    unsigned char* const bytes = wav.data() + samples.begin + 2 * first;
    for (size_t i = 0; i < n; i++) {
      int16_t sample;
      std::memcpy(&sample, bytes + 2 * i, 2);
      block[i] = float(sample) / 32768;
    }
    const auto start = std::chrono::steady_clock::now();
    network_process(network, block, block, n);
    spent += std::chrono::steady_clock::now() - start;
    for (size_t i = 0; i < n; i++) {
      const float scaled = std::nearbyint(block[i] * 32768);
      const int16_t sample = int16_t(std::max(-32768.0f, std::min(32767.0f, scaled)));
      std::memcpy(bytes + 2 * i, &sample, 2);
    }
  }
  network_destroy(network);

  std::FILE* file = std::fopen(argv[2], "wb");
  if (!file || std::fwrite(wav.data(), 1, wav.size(), file) != wav.size())
    Fail("cannot be written", argv[2]);
  std::fclose(file);
  std::printf("%.4f\n", samples.count ? spent.count() / double(samples.count) * 1e6 : 0.0);
}
