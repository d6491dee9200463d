// A CUDA device that does nothing, for PyTorch's CPU build.
//
// With tensors that have sizes but no data, PyTorch needs little of a device: autograd asks which streams
// its threads work on, and which accelerator there is. The CPU build has no answer and aborts. This library,
// loaded before PyTorch's own (LD_PRELOAD), answers: two devices, one stream each, always done.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceIndex kDevices = 2;
thread_local c10::DeviceIndex current = 0;

struct IdleGuard final : public c10::impl::DeviceGuardImplInterface {
  static c10::Device device(c10::DeviceIndex index) { return {c10::DeviceType::CUDA, index}; }

  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device getDevice() const override { return device(current); }
  void uncheckedSetDevice(c10::Device wanted) const noexcept override {
    if (wanted.has_index()) current = wanted.index();
  }
  void setDevice(c10::Device wanted) const override { uncheckedSetDevice(wanted); }
  c10::Device exchangeDevice(c10::Device wanted) const override {
    const c10::Device before = getDevice();
    uncheckedSetDevice(wanted);
    return before;
  }

  c10::Stream getStream(c10::Device of) const override {
    return c10::Stream(c10::Stream::DEFAULT, of.has_index() ? of : getDevice());
  }
  c10::Stream getNewStream(c10::Device of, int) const override { return getStream(of); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}

  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, IdleGuard)

}  // namespace

namespace at {

// The name under which PyTorch looks for the hooks of its CUDA half.
struct CUDAHooks : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex current_device() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  int getNumGPUs() const override { return kDevices; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

namespace accelerator {

// Stands before PyTorch's own, which knows at compile time that it has none.
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
__attribute__((visibility("default"))) bool isAccelerator(c10::DeviceType type) {
  return type == c10::DeviceType::CUDA;
}

}  // namespace accelerator
}  // namespace at
