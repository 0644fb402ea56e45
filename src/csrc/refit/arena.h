// Memory that two processes share. It never has a name for longer than it takes to open it, so that none is left behind
// whoever is killed; the other process gets it as a file descriptor over a socket.
#pragma once

#include <cstdint>

namespace fastrlhf {

class Arena {
 public:
  // New, zeroed, every page reserved: too little memory is an error here and no signal later.
  explicit Arena(int64_t bytes);
  // What another process made. Takes the descriptor over.
  Arena(int fd, int64_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* data() const { return data_; }
  int64_t size() const { return bytes_; }
  int fd() const { return fd_; }

 private:
  void map();
  int fd_ = -1;
  int64_t bytes_ = 0;
  void* data_ = nullptr;
};

}  // namespace fastrlhf
