__global__ void probe() {}
int main() { probe<<<1, 1>>>(); }
