// DQN on CartPole-v1 as one C++ program on libtorch: what the other host loops do, without Python.
//
// Every argument is a pair "--name value"; all of them are required. It prints one line of JSON, see report().
// "libtorch_dqn --trace" runs the environment alone: it reads a state of four numbers and then actions from its standard input, and
// prints the observation behind each action with two flags, terminated and truncated, so that a test can compare it with Gymnasium.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cartpole.hpp"

namespace {

constexpr int kEvaluationEpisodes = 20;
constexpr int kLatencies = 2'000;  // Calls timed one by one.

// ---- The work.

struct Setting {
  std::vector<int64_t> hidden;
  int64_t batch_size, interval, n_steps, capacity, warmup, epsilon_steps, target_interval;
  double gamma, learning_rate, epsilon_start, epsilon_end;
  bool is_double;
  int64_t steps, begin, seed;
  int threads;
};

template <typename Number>
std::vector<Number> numbers(const std::string& text) {
  std::vector<Number> found;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) found.push_back(Number(std::stod(part)));
  return found;
}

Setting parse(int argc, char** argv) {
  std::map<std::string, std::string> given;
  for (int i = 1; i + 1 < argc; i += 2) given[argv[i]] = argv[i + 1];
  auto text = [&](const std::string& name) {
    if (!given.count("--" + name)) throw std::invalid_argument("--" + name + " is missing");
    return given["--" + name];
  };
  auto whole = [&](const std::string& name) { return int64_t(std::stoll(text(name))); };
  const auto epsilon = numbers<double>(text("epsilon"));
  if (epsilon.size() != 3) throw std::invalid_argument("--epsilon takes start,end,steps");
  Setting s;
  s.hidden = numbers<int64_t>(text("hidden"));
  s.batch_size = whole("batch-size");
  s.interval = whole("interval");
  s.n_steps = whole("n-steps");
  s.capacity = whole("capacity");
  s.warmup = whole("warmup");
  s.gamma = std::stod(text("gamma"));
  s.learning_rate = std::stod(text("learning-rate"));
  s.epsilon_start = epsilon[0];
  s.epsilon_end = epsilon[1];
  s.epsilon_steps = int64_t(epsilon[2]);
  s.target_interval = whole("target-interval");
  s.is_double = whole("double") != 0;
  s.steps = whole("steps");
  s.begin = whole("begin");
  s.seed = whole("seed");
  s.threads = int(whole("threads"));
  return s;
}

// ---- The network, the replay, the agent.

// A multilayer perceptron with ReLU, initialized as PyTorch's Linear is.
class QNetwork {
 public:
  explicit QNetwork(const std::vector<int64_t>& hidden) {
    int64_t width = kFeatures;
    for (int64_t next : hidden) {
      add_layer(width, next);
      width = next;
    }
    add_layer(width, kActions);
  }

  at::Tensor forward(const at::Tensor& observation) const {
    at::Tensor x = observation;
    for (size_t i = 0; i + 2 < parameters.size(); i += 2) x = at::relu(at::linear(x, parameters[i], parameters[i + 1]));
    return at::linear(x, parameters[parameters.size() - 2], parameters.back());
  }

  std::vector<at::Tensor> parameters;  // Weights and biases in turns.

 private:
  void add_layer(int64_t from, int64_t to) {
    const double bound = 1.0 / std::sqrt(double(from));
    parameters.push_back(at::empty({to, from}).uniform_(-bound, bound).set_requires_grad(true));
    parameters.push_back(at::empty({to}).uniform_(-bound, bound).set_requires_grad(true));
  }
};

struct Row {
  Observation observation, successor;
  float reward;
  int32_t action;
  bool terminated, last;
};

class Replay {
 public:
  explicit Replay(const Setting& s) : rows_(s.capacity), setting_(s) {}

  void add(const Row& row) { rows_[stored_++ % setting_.capacity] = row; }

  int64_t stored() const { return stored_; }

  // Fills the batch with n-step returns of uniformly drawn transitions. A window ends early at an episode's end or at the newest row.
  void sample(Random& random) {
    std::uniform_int_distribution<int64_t> any(0, std::min(stored_, setting_.capacity) - 1);
    const int64_t newest = (stored_ - 1) % setting_.capacity;
    float* observations = observation.data_ptr<float>();
    float* successors = successor.data_ptr<float>();
    for (int64_t b = 0; b < setting_.batch_size; ++b) {
      int64_t at = any(random);
      const Row* row = &rows_[at];
      std::copy(row->observation.begin(), row->observation.end(), observations + b * kFeatures);
      action.data_ptr<int64_t>()[b] = row->action;
      double total = row->reward, travelled = setting_.gamma;
      for (int64_t n = 1; n < setting_.n_steps && !row->last && at != newest; ++n) {
        at = (at + 1) % setting_.capacity;
        row = &rows_[at];
        total += travelled * row->reward;
        travelled *= setting_.gamma;
      }
      std::copy(row->successor.begin(), row->successor.end(), successors + b * kFeatures);
      reward.data_ptr<float>()[b] = float(total);
      discount.data_ptr<float>()[b] = row->terminated ? 0.0f : float(travelled);
    }
  }

 private:
  std::vector<Row> rows_;
  Setting setting_;
  int64_t stored_ = 0;

 public:
  // The batch.
  at::Tensor observation = at::empty({setting_.batch_size, kFeatures});
  at::Tensor action = at::empty({setting_.batch_size, 1}, at::kLong);
  at::Tensor reward = at::empty({setting_.batch_size});
  at::Tensor discount = at::empty({setting_.batch_size});
  at::Tensor successor = at::empty({setting_.batch_size, kFeatures});
};

// Adam with its usual constants, as one kernel over all parameters, the one behind torch.optim.Adam(fused=True). torch::optim::Adam calls a
// dozen small ones for each parameter instead: measured, it made the whole update half as slow again.
class Adam {
 public:
  Adam(std::vector<at::Tensor> parameters, double learning_rate) : parameters_(std::move(parameters)), learning_rate_(learning_rate) {
    for (const at::Tensor& parameter : parameters_) {
      means_.push_back(at::zeros_like(parameter));
      squares_.push_back(at::zeros_like(parameter));
    }
    steps_.assign(parameters_.size(), at::zeros({}));  // One tensor, seen from every parameter.
  }

  void zero_grad() {
    for (at::Tensor& parameter : parameters_) parameter.mutable_grad().reset();
  }

  void step() {
    c10::NoGradGuard no_gradients;
    std::vector<at::Tensor> gradients;
    gradients.reserve(parameters_.size());
    for (const at::Tensor& parameter : parameters_) gradients.push_back(parameter.grad());
    steps_[0].add_(1);
    at::_fused_adam_(
        parameters_, gradients, means_, squares_, {}, steps_, learning_rate_, /*beta1=*/0.9, /*beta2=*/0.999, /*weight_decay=*/0.0,
        /*eps=*/1e-8, /*amsgrad=*/false, /*maximize=*/false);
  }

 private:
  std::vector<at::Tensor> parameters_, means_, squares_, steps_;
  double learning_rate_;
};

class Agent {
 public:
  explicit Agent(const Setting& s)
      : setting_(s),
        online_(s.hidden),
        target_(s.hidden),
        optimizer_(online_.parameters, s.learning_rate),
        replay_(s),
        random_(uint64_t(s.seed)) {
    refresh_target();
  }

  int greedy(const Observation& observation) {
    c10::InferenceMode no_gradients;
    std::copy(observation.begin(), observation.end(), seen_.data_ptr<float>());
    const at::Tensor values = online_.forward(seen_);
    const float* value = values.data_ptr<float>();
    return value[1] > value[0] ? 1 : 0;
  }

  int explore(const Observation& observation) {
    const double progress = std::min(1.0, double(replay_.stored()) / double(setting_.epsilon_steps));
    const double epsilon = setting_.epsilon_start + (setting_.epsilon_end - setting_.epsilon_start) * progress;
    return unit_(random_) < epsilon ? int(random_() % kActions) : greedy(observation);
  }

  // Stores a transition and learns if that is due; tells whether it was.
  bool observe(const Row& row) {
    replay_.add(row);
    const bool is_due = replay_.stored() >= setting_.warmup && replay_.stored() % setting_.interval == 0;
    if (is_due) update();
    if (replay_.stored() % setting_.target_interval == 0) refresh_target();
    return is_due;
  }

  void update() {
    replay_.sample(random_);
    at::Tensor goal;
    {
      c10::NoGradGuard no_gradients;
      const at::Tensor values = target_.forward(replay_.successor);
      const at::Tensor value =
          setting_.is_double ? values.gather(1, online_.forward(replay_.successor).argmax(1, true)).squeeze(1) : values.amax(1);
      goal = at::addcmul(replay_.reward, replay_.discount, value);
    }
    const at::Tensor chosen = online_.forward(replay_.observation).gather(1, replay_.action).squeeze(1);
    optimizer_.zero_grad();
    at::mse_loss(chosen, goal).backward();
    optimizer_.step();
    ++updates;
  }

  Random& random() { return random_; }

  int64_t updates = 0;

 private:
  void refresh_target() {
    c10::NoGradGuard no_gradients;
    for (size_t i = 0; i < online_.parameters.size(); ++i) target_.parameters[i].copy_(online_.parameters[i]);
  }

  Setting setting_;
  QNetwork online_, target_;
  Adam optimizer_;
  Replay replay_;
  Random random_;
  std::uniform_real_distribution<double> unit_{0.0, 1.0};
  at::Tensor seen_ = at::empty({1, kFeatures});
};

// ---- The measurements.

struct Moment {
  double wall, own, busy;  // Seconds: of the wall, of this process's CPU time, of the whole machine's (-1 where it does not tell).
};

Moment now() {
  timespec own;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &own);
  double busy = -1.0;
  std::ifstream stat("/proc/stat");
  std::string name;
  std::array<double, 8> ticks;
  if (stat >> name) {
    for (double& number : ticks) stat >> number;
    busy = (ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6] + ticks[7]) / double(sysconf(_SC_CLK_TCK));
  }
  const std::chrono::duration<double> wall = std::chrono::steady_clock::now().time_since_epoch();
  return {wall.count(), double(own.tv_sec) + 1e-9 * double(own.tv_nsec), busy};
}

// The most memory this process has had, in MiB; -1 where the system does not tell.
double peak_mib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::stod(line.substr(6)) / 1024.0;
  }
  return -1.0;
}

template <typename Function>
double microseconds(Function&& function) {
  const auto begin = std::chrono::steady_clock::now();
  function();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
}

// As JSON: three quantiles, or null where there is nothing.
std::string quantiles(std::vector<double> values) {
  if (values.empty()) return "null";
  std::sort(values.begin(), values.end());
  std::ostringstream json;
  const char* separator = "{";
  for (int percent : {50, 95, 99}) {
    json << separator << "\"p" << percent << "\": " << values[(values.size() - 1) * percent / 100];
    separator = ", ";
  }
  return json.str() + "}";
}

struct Loop {
  Agent& agent;
  CartPole env;

  explicit Loop(Agent& learner) : agent(learner) { env.reset(agent.random()); }

  // One step of the environment and what follows; `between` is called where the environment has stepped and nothing is stored yet.
  template <typename Function>
  bool step(Function&& between) {
    Row row;
    row.observation = env.observation();
    row.action = agent.explore(row.observation);
    const Ending ending = env.step(row.action);
    between();
    row.successor = env.observation();
    row.reward = 1.0f;
    row.terminated = ending.terminated;
    row.last = ending.last();
    if (row.last) env.reset(agent.random());
    return agent.observe(row);
  }
};

double greedy_return(Agent& agent) {
  CartPole env;
  env.reset(agent.random());
  double total = 0.0;
  for (Ending ending{}; !ending.last(); total += 1.0) ending = env.step(agent.greedy(env.observation()));
  return total;
}

// Times single calls, at the end: what is learnt meanwhile is not evaluated.
std::string latencies(Agent& agent, Loop& loop) {
  std::vector<double> act, quiet, learning, update;
  for (int i = 0; i < kLatencies; ++i) {
    const Observation observation = loop.env.observation();
    act.push_back(microseconds([&] { agent.greedy(observation); }));
    bool has_learnt = false;
    const double took = microseconds([&] { has_learnt = loop.step([] {}); });
    (has_learnt ? learning : quiet).push_back(took);
  }
  while (learning.size() < 500) {
    bool has_learnt = false;
    const double took = microseconds([&] { has_learnt = loop.step([] {}); });
    if (has_learnt) learning.push_back(took);
  }
  for (int i = 0; i < kLatencies; ++i) update.push_back(microseconds([&] { agent.update(); }));
  return "{\"act\": " + quantiles(act) + ", \"step\": " + quantiles(quiet) + ", \"step_with_update\": " + quantiles(learning) +
         ", \"update\": " + quantiles(update) + "}";
}

int report(const Setting& s) {
  at::set_num_threads(s.threads);
  at::manual_seed(uint64_t(s.seed));
  const double start_mib = peak_mib();
  Agent agent(s);
  Loop loop(agent);
  const double built_mib = peak_mib();
  double first_update_mib = -1.0;
  Moment begin{}, end{};
  int64_t made = 0, updates = 0;
  for (int64_t i = 0; i < s.steps; ++i) {
    const bool has_learnt = loop.step([&] {
      ++made;
      if (made == s.begin) {
        updates = agent.updates;
        begin = now();
      } else if (made == s.steps) {
        end = now();
        updates = agent.updates - updates;
      }
    });
    if (has_learnt && agent.updates == 1) first_update_mib = peak_mib();
  }
  const double end_mib = peak_mib(), steps = double(s.steps - s.begin), wall = end.wall - begin.wall, own = end.own - begin.own;
  std::ostringstream json;
  json << "{\"steps_per_second\": " << steps / wall << ", \"cpu_us_per_step\": " << own / steps * 1e6 << ", \"others_cores\": ";
  if (begin.busy < 0 || end.busy < 0) {
    json << "null";
  } else {
    json << std::max(0.0, (end.busy - begin.busy - own) / wall);
  }
  json << ", \"updates\": " << updates << ", \"memory_mib\": {\"start\": " << start_mib << ", \"built\": " << built_mib
       << ", \"first_update\": " << first_update_mib << ", \"end\": " << end_mib << "}, \"returns\": [";
  for (int i = 0; i < kEvaluationEpisodes; ++i) json << (i ? ", " : "") << greedy_return(agent);
  json << "]";
  std::cout << json.str() << ", \"latency_us\": " << latencies(agent, loop) << "}" << std::endl;
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return argc == 2 && std::string(argv[1]) == "--trace" ? trace() : report(parse(argc, argv));
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 2;
  }
}
