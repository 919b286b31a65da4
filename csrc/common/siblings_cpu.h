// Samples that share a velocity row: a kernel walks rows, and reads a row once for all of its samples.
#pragma once

#include <cstdint>
#include <vector>

// The samples of every row, in ascending order: a counting sort of `row`, (batch,), or nullptr where sample b has row b.
// Only samples for which keep(sample) holds are listed.
class Siblings {
 public:
  template <class Keep>
  Siblings(int64_t rows, int64_t batch, const int64_t* row, Keep keep) : first_(rows + 1, 0), samples_(batch) {
    for (int64_t b = 0; b < batch; ++b) first_[(row ? row[b] : b) + 1] += keep(b) ? 1 : 0;
    for (int64_t r = 0; r < rows; ++r) first_[r + 1] += first_[r];
    std::vector<int64_t> next(first_.begin(), first_.end() - 1);
    for (int64_t b = 0; b < batch; ++b)
      if (keep(b)) samples_[next[row ? row[b] : b]++] = b;
  }
  const int64_t* begin(int64_t row) const { return samples_.data() + first_[row]; }
  const int64_t* end(int64_t row) const { return samples_.data() + first_[row + 1]; }

 private:
  std::vector<int64_t> first_, samples_;
};
