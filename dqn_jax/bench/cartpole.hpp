// CartPole-v1 as Gymnasium computes it: in float64, observed in float32.

#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <random>

constexpr int64_t kFeatures = 4;
constexpr int64_t kActions = 2;

using Random = std::mt19937_64;
using Observation = std::array<float, kFeatures>;

struct Ending {
  bool terminated, truncated;
  bool last() const { return terminated || truncated; }
};

class CartPole {
 public:
  void reset(Random& random) {
    std::uniform_real_distribution<double> near_zero(-0.05, 0.05);
    for (double& number : state_) number = near_zero(random);
    steps_ = 0;
  }

  void place(const std::array<double, kFeatures>& state) {
    state_ = state;
    steps_ = 0;
  }

  Observation observation() const {
    return {float(state_[0]), float(state_[1]), float(state_[2]), float(state_[3])};
  }

  Ending step(int action) {
    constexpr double gravity = 9.8, pole_mass = 0.1, total_mass = 1.1, half_length = 0.5, seconds = 0.02, newtons = 10.0;
    constexpr double moment = pole_mass * half_length, widest_angle = 12 * 2 * M_PI / 360, widest_position = 2.4;
    auto& [x, x_dot, theta, theta_dot] = state_;
    const double force = action == 1 ? newtons : -newtons, cosine = std::cos(theta), sine = std::sin(theta);
    const double shared = (force + moment * (theta_dot * theta_dot) * sine) / total_mass;
    const double theta_acceleration =
        (gravity * sine - cosine * shared) / (half_length * (4.0 / 3.0 - pole_mass * (cosine * cosine) / total_mass));
    const double x_acceleration = shared - moment * theta_acceleration * cosine / total_mass;
    // Explicit Euler: positions move by the old speeds.
    x += seconds * x_dot;
    x_dot += seconds * x_acceleration;
    theta += seconds * theta_dot;
    theta_dot += seconds * theta_acceleration;
    ++steps_;
    return {std::abs(x) > widest_position || std::abs(theta) > widest_angle, steps_ >= 500};
  }

 private:
  std::array<double, kFeatures> state_{};
  int64_t steps_ = 0;
};

// Reads a state and then actions from the standard input, and prints what follows each: see the head of libtorch_dqn.cpp.
inline int trace() {
  std::array<double, kFeatures> state;
  for (double& number : state) std::cin >> number;
  CartPole env;
  env.place(state);
  for (int action; std::cin >> action;) {
    const Ending ending = env.step(action);
    for (float number : env.observation()) std::printf("%.9g ", number);
    std::printf("%d %d\n", ending.terminated, ending.truncated);
  }
  return 0;
}
