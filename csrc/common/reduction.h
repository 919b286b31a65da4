// What a loss makes of the losses of its samples.
#pragma once

enum class Reduction : int { mean = 0, sum = 1, none = 2 };
