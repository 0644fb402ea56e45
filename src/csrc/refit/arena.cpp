#include "arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastrlhf {
namespace {

std::string reason() { return std::string(": ") + std::strerror(errno); }

int shm() {
  static std::atomic<int> number{0};
  const std::string name = "/fastrlhf-refit-" + std::to_string(getpid()) + "-" + std::to_string(number++);
  const int fd = shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd >= 0) shm_unlink(name.c_str());
  return fd;
}

// What the kernel says can be had without swapping; no limit where it says nothing. Reserving more would not fail: it would
// have processes killed.
int64_t available() {
  int64_t kilobytes = INT64_MAX >> 10;
  if (FILE* file = std::fopen("/proc/meminfo", "r")) {
    char line[128];
    while (std::fgets(line, sizeof line, file)) {
      long long found;
      if (std::sscanf(line, "MemAvailable: %lld", &found) == 1) kilobytes = found;
    }
    std::fclose(file);
  }
  return kilobytes << 10;
}

bool reserve(int fd, int64_t bytes) {
  int error = EINTR;
  if (bytes > available()) return errno = ENOMEM, false;
  if (ftruncate(fd, bytes) != 0) return false;
  while (error == EINTR) error = posix_fallocate(fd, 0, bytes);
  errno = error;
  return error == 0;
}

}  // namespace

Arena::Arena(int64_t bytes) : bytes_(bytes) {
  if (bytes < 1) throw std::invalid_argument("bytes: expected >= 1, got " + std::to_string(bytes));
  fd_ = shm();
  if (fd_ < 0 || !reserve(fd_, bytes)) {
    // /dev/shm is often small in a container; memory of a memfd is not counted there
    if (fd_ >= 0) close(fd_);
    fd_ = memfd_create("fastrlhf-refit", MFD_CLOEXEC);
    if (fd_ < 0 || !reserve(fd_, bytes)) {
      const std::string why = reason();
      if (fd_ >= 0) close(fd_);
      throw std::runtime_error("shared memory: " + std::to_string(bytes) + " bytes cannot be had" + why);
    }
  }
  map();
}

Arena::Arena(int fd, int64_t bytes) : fd_(fd), bytes_(bytes) {
  struct stat found;
  if (fstat(fd, &found) != 0 || found.st_size < bytes) {
    const int64_t size = found.st_size;
    close(fd);
    throw std::invalid_argument("fd: holds " + std::to_string(size) + " bytes, expected " + std::to_string(bytes));
  }
  map();
}

void Arena::map() {
  data_ = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, 0);
  if (data_ != MAP_FAILED) return;
  const std::string why = reason();
  close(fd_);
  throw std::runtime_error("mmap of " + std::to_string(bytes_) + " bytes" + why);
}

Arena::~Arena() {
  munmap(data_, static_cast<size_t>(bytes_));
  close(fd_);
}

}  // namespace fastrlhf
