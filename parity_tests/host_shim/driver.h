// Reads a job file, runs the kernel over its grid, writes the outputs. Included after the kernel's text and
// `flux_entry`, which calls the kernel with buffers[0], buffers[1], ... in Metal's order.
//
// Job: uint32 schedule, seed, grid[3] and threadgroup[3] in threads, buffer count; for each buffer uint32 use (0 input,
// 1 output, 2 both) and uint64 bytes; then the bytes of the inputs. Result: uint64 bytes of threadgroup memory, then the
// outputs.
// Outputs start as NaN (0xff in every byte). Exit code 3: an error of the kernel, said on stderr.
#pragma once

#include <utility>

struct JobHeader {
  uint32_t schedule, seed, grid[3], threads[3], buffers;
};

struct JobBuffer {
  uint32_t use, padding;
  uint64_t bytes;
};

static void* flux_buffers[64];
static void flux_entry(void** buffers);

static void flux_kernel() { flux_entry(flux_buffers); }

static void flux_read(FILE* file, void* data, size_t bytes) {
  if (std::fread(data, 1, bytes, file) != bytes) lockstep::fail("driver: the job file is too short");
}

static void flux_run_grid(const JobHeader& job) {
  lockstep::Threadgroup& tg = lockstep::tg;
  tg.kernel = flux_kernel;
  tg.schedule = (lockstep::Schedule)job.schedule;
  tg.random = job.seed * 2654435761ull + 1;
  tg.threads = job.threads[0] * job.threads[1] * job.threads[2];
  if (tg.threads == 0 || tg.threads > lockstep::kMaxThreads) lockstep::fail("driver: 1 to 1024 threads a threadgroup");
  for (int axis = 0; axis < 3; axis++) {
    if (job.grid[axis] == 0 || job.grid[axis] % job.threads[axis])
      lockstep::fail("driver: the grid is not a whole number of threadgroups");
    tg.groups[axis] = job.grid[axis] / job.threads[axis];
  }
  const uint32_t groups = tg.groups[0] * tg.groups[1] * tg.groups[2];
  std::vector<uint32_t> order(groups);
  for (uint32_t i = 0; i < groups; i++) order[i] = tg.schedule == lockstep::Schedule::behind ? groups - 1 - i : i;
  if (tg.schedule == lockstep::Schedule::shuffled)
    for (uint32_t i = groups; i > 1; i--) std::swap(order[i - 1], order[lockstep::draw(i)]);
  for (const uint32_t group : order) {
    tg.position[0] = group % tg.groups[0];
    tg.position[1] = group / tg.groups[0] % tg.groups[1];
    tg.position[2] = group / tg.groups[0] / tg.groups[1];
    lockstep::run_threadgroup();
  }
}

int main(int argc, char** argv) {
  FILE* file = argc == 3 ? std::fopen(argv[1], "rb") : nullptr;
  if (!file) lockstep::fail("driver: usage: JOB RESULT");
  JobHeader job;
  flux_read(file, &job, sizeof job);
  if (job.buffers > 31) lockstep::fail("driver: more than 31 buffers");
  std::vector<JobBuffer> buffers(job.buffers);
  flux_read(file, buffers.data(), buffers.size() * sizeof(JobBuffer));
  for (uint32_t i = 0; i < job.buffers; i++) flux_buffers[i] = lockstep::guarded_alloc(buffers[i].bytes, 0xff);
  for (uint32_t i = 0; i < job.buffers; i++)
    if (buffers[i].use != 1) flux_read(file, flux_buffers[i], buffers[i].bytes);
  std::fclose(file);
  flux_run_grid(job);
  file = std::fopen(argv[2], "wb");
  if (!file) lockstep::fail("driver: cannot write the result");
  const uint64_t scratch_bytes = lockstep::tg.scratch_bytes;
  std::fwrite(&scratch_bytes, sizeof scratch_bytes, 1, file);
  for (uint32_t i = 0; i < job.buffers; i++)
    if (buffers[i].use) std::fwrite(flux_buffers[i], 1, buffers[i].bytes, file);
  return std::fclose(file) ? 1 : 0;
}
